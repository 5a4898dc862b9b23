package kvm

import (
	"encoding/binary"
	"unsafe"
)

// xsaveLegacySize is sizeof(struct kvm_xsave) without its flexible tail.
const xsaveLegacySize = 4096

// XSAVESize returns the size of the XSAVE state in bytes: CapXSAVE2's answer when
// the vCPU was made, 4096 where the kernel does not have it.
func (v *VCPU) XSAVESize() int { return v.xsaveSize }

// GetXSAVE reads the x87, SSE, AVX, ... state in XSAVE's standard layout,
// XSAVESize bytes long.
func (v *VCPU) GetXSAVE() ([]byte, error) {
	op, req := "KVM_GET_XSAVE", reqGetXSAVE
	if v.xsave2 {
		op, req = "KVM_GET_XSAVE2", reqGetXSAVE2
	}
	state := make([]byte, v.xsaveSize)
	_, err := v.h.ioctl(req, unsafe.Pointer(unsafe.SliceData(state)))
	if err != nil {
		return nil, opError(err, op, "%s, %d bytes", v.what, len(state))
	}
	return state, nil
}

// SetXSAVE loads what GetXSAVE saved, also on a host whose state has another
// size: a shorter one is filled up with zeros, which its header says are not in
// use; a longer one is refused unless the rest is zeros.
func (v *VCPU) SetXSAVE(state []byte) error {
	const op = "KVM_SET_XSAVE"
	for _, b := range state[min(len(state), v.xsaveSize):] {
		if b != 0 {
			return opError(invalid("this host takes %d bytes", v.xsaveSize), op, "%s, %d bytes", v.what, len(state))
		}
	}
	buf := make([]byte, v.xsaveSize)
	copy(buf, state)
	_, err := v.h.ioctl(reqSetXSAVE, unsafe.Pointer(unsafe.SliceData(buf)))
	return opError(err, op, "%s, %d bytes", v.what, len(state))
}

// nestedHeaderSize is sizeof(struct kvm_nested_state) without its data; its size
// field, which counts header and data, is at offset 4.
const (
	nestedHeaderSize = 128
	nestedSizeAt     = 4
)

// GetNestedState reads the state of a guest that is a hypervisor itself.
// errors.ErrUnsupported where the kernel has none (CapNestedState).
func (v *VCPU) GetNestedState() ([]byte, error) {
	const op = "KVM_GET_NESTED_STATE"
	if v.nested < nestedHeaderSize {
		return nil, opError(unsupported("this KVM has no nested state"), op, "%s", v.what)
	}
	state := make([]byte, v.nested)
	binary.LittleEndian.PutUint32(state[nestedSizeAt:], uint32(len(state)))
	if _, err := v.h.ioctl(reqGetNestedState, unsafe.Pointer(unsafe.SliceData(state))); err != nil {
		return nil, opError(err, op, "%s", v.what)
	}
	size := binary.LittleEndian.Uint32(state[nestedSizeAt:])
	if size < nestedHeaderSize || int64(size) > int64(len(state)) {
		return nil, opError(invalid("the kernel says %d of %d bytes", size, len(state)), op, "%s", v.what)
	}
	return state[:size], nil
}

// SetNestedState loads what GetNestedState saved.
func (v *VCPU) SetNestedState(state []byte) error {
	const op = "KVM_SET_NESTED_STATE"
	if v.nested < nestedHeaderSize {
		return opError(unsupported("this KVM has no nested state"), op, "%s", v.what)
	}
	if len(state) < nestedHeaderSize || uint64(binary.LittleEndian.Uint32(state[nestedSizeAt:])) > uint64(len(state)) {
		return opError(invalid("state of %d bytes is shorter than it says", len(state)), op, "%s", v.what)
	}
	_, err := v.h.ioctl(reqSetNestedState, unsafe.Pointer(unsafe.SliceData(state)))
	return opError(err, op, "%s", v.what)
}
