package kvm

import "unsafe"

// MSR is a model-specific register and its value: struct kvm_msr_entry.
type MSR struct {
	Index uint32 `cbor:"index"`
	_     uint32
	Data  uint64 `cbor:"data"`
}

const (
	msrHeaderSize = 8
	// msrBatch is how many MSRs one call may carry: below MAX_IO_MSRS, which is
	// 256 (arch/x86/kvm/x86.c).
	msrBatch = 255
	// maxMSRList bounds what the kernel may claim to have.
	maxMSRList = 1 << 16
)

// msrs is struct kvm_msrs with room for a batch.
type msrs struct {
	n       uint32
	_       uint32
	entries [msrBatch]MSR
}

// transferMSRs passes in to the kernel in batches and collects what came back.
// The kernel stops at the first MSR that it refuses; that one is noted and the
// rest goes on.
func (h *handle) transferMSRs(op, what string, req uintptr, in []MSR) (done []MSR, err error) {
	var refused []uint32
	buf := new(msrs)
	for len(in) > 0 {
		n := copy(buf.entries[:], in)
		buf.n = uint32(n)
		moved, err := h.ioctl(req, unsafe.Pointer(buf))
		if err != nil {
			return done, opError(err, op, "%s, %d MSRs from %#x", what, n, in[0].Index)
		}
		if moved > n {
			return done, opError(invalid("the kernel says %d of %d", moved, n), op, "%s", what)
		}
		done = append(done, buf.entries[:moved]...)
		if moved < n {
			refused = append(refused, in[moved].Index)
			moved++
		}
		in = in[moved:]
	}
	if refused != nil {
		return done, &MSRError{Op: op, What: what, Refused: refused}
	}
	return done, nil
}

func (h *handle) getMSRs(what string, indices []uint32) ([]MSR, error) {
	in := make([]MSR, len(indices))
	for i, index := range indices {
		in[i].Index = index
	}
	return h.transferMSRs("KVM_GET_MSRS", what, reqGetMSRs, in)
}

// GetMSRs reads MSRs, any number of them. One that the kernel refuses is left
// out of the result and listed in an [*MSRError]; the others are returned with
// it. Any other error is an [*OpError].
func (v *VCPU) GetMSRs(indices []uint32) ([]MSR, error) {
	return v.h.getMSRs(v.what, indices)
}

// SetMSRs writes MSRs in their order and returns how many landed. One that the
// kernel refuses is listed in an [*MSRError] and the rest is written all the
// same. Any other error is an [*OpError].
func (v *VCPU) SetMSRs(list []MSR) (int, error) {
	done, err := v.h.transferMSRs("KVM_SET_MSRS", v.what, reqSetMSRs, list)
	return len(done), err
}
