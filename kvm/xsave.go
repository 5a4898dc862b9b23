package kvm

import "unsafe"

// xsaveLegacySize is sizeof(struct kvm_xsave) without its flexible tail.
const xsaveLegacySize = 4096

// GetXSAVE reads the x87, SSE, AVX, ... state in XSAVE's standard layout. Its
// length is KVM_CAP_XSAVE2's value when the vCPU was created, or 4096 if the
// kernel does not have that capability.
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

// SetXSAVE loads what GetXSAVE has read, also from a host whose state has another
// size: a shorter state is extended with zeros, which its header says are not in
// use; a longer one is an error unless the rest is zeros.
func (v *VCPU) SetXSAVE(state []byte) error {
	const op = "KVM_SET_XSAVE"
	for _, b := range state[min(len(state), v.xsaveSize):] {
		if b != 0 {
			return opError(invalid("expected at most %d bytes", v.xsaveSize), op, "%s, %d bytes", v.what, len(state))
		}
	}
	buf := make([]byte, v.xsaveSize)
	copy(buf, state)
	_, err := v.h.ioctl(reqSetXSAVE, unsafe.Pointer(unsafe.SliceData(buf)))
	return opError(err, op, "%s, %d bytes", v.what, len(state))
}
