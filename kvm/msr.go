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
	// maxMSRList limits the number of MSRs that the kernel may report.
	maxMSRList = 1 << 16
)

// msrs is struct kvm_msrs with a full batch.
type msrs struct {
	n       uint32
	_       uint32
	entries [msrBatch]MSR
}

// transferMSRs passes in to the kernel in batches and collects the results. The
// kernel stops at the first MSR that it refuses; transferMSRs notes that one and
// goes on with the next.
func (v *VCPU) transferMSRs(op string, req uintptr, in []MSR) (done []MSR, err error) {
	var refused []uint32
	buf := new(msrs)
	for len(in) > 0 {
		n := copy(buf.entries[:], in)
		buf.n = uint32(n)
		moved, err := v.h.ioctl(req, unsafe.Pointer(buf))
		if err != nil {
			return done, opError(err, op, "%s, %d MSRs from %#x", v.what, n, in[0].Index)
		}
		if moved > n {
			return done, opError(invalid("the kernel reports %d of %d MSRs", moved, n), op, "%s", v.what)
		}
		done = append(done, buf.entries[:moved]...)
		if moved < n {
			refused = append(refused, in[moved].Index)
			moved++
		}
		in = in[moved:]
	}
	if refused != nil {
		return done, &MSRError{Op: op, What: v.what, Refused: refused}
	}
	return done, nil
}

// GetMSRs reads MSRs, any number of them. An MSR that the kernel refuses is
// missing in the result and listed in an [*MSRError], which is returned with the
// other MSRs.
func (v *VCPU) GetMSRs(indices []uint32) ([]MSR, error) {
	in := make([]MSR, len(indices))
	for i, index := range indices {
		in[i].Index = index
	}
	return v.transferMSRs("KVM_GET_MSRS", reqGetMSRs, in)
}

// SetMSRs writes MSRs in their order and returns how many it has written. An MSR
// that the kernel refuses is listed in an [*MSRError]; the others are written.
func (v *VCPU) SetMSRs(list []MSR) (int, error) {
	done, err := v.transferMSRs("KVM_SET_MSRS", reqSetMSRs, list)
	return len(done), err
}
