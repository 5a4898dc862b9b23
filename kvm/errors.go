package kvm

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// opError adds a call's name in the kernel's headers, its object and its arguments
// to its error; nil stays nil. For example:
//
//	KVM_CLEAR_DIRTY_LOG slot 3 pages [0x40000,0x80000): invalid argument
func opError(err error, op, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", op, fmt.Sprintf(format, args...), err)
}

// invalid is the cause of a call with arguments that are not passed to the kernel.
func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), unix.EINVAL)
}

// unsupported is the cause of a call that this host's KVM does not support.
func unsupported(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errors.ErrUnsupported)
}

// MSRError lists the MSRs that the kernel refused to read or write. The call has
// transferred all others.
type MSRError struct {
	// Op is KVM_GET_MSRS or KVM_SET_MSRS.
	Op string
	// What is the vCPU.
	What string
	// Refused are the indices of the MSRs, in the order of the call.
	Refused []uint32
}

// Error lists the indices of the refused MSRs.
func (e *MSRError) Error() string {
	names := make([]string, len(e.Refused))
	for i, index := range e.Refused {
		names[i] = fmt.Sprintf("%#x", index)
	}
	return e.Op + " " + e.What + ": the kernel refused MSR " + strings.Join(names, ", ")
}
