package kvm

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// OpError is a failed KVM call: the ioctl or system call, its object and
// arguments, and the cause. For example:
//
//	KVM_CLEAR_DIRTY_LOG slot 3 pages [0x40000,0x80000): invalid argument
type OpError struct {
	// Op is the ioctl's name in the kernel's headers.
	Op string
	// What is the object and the arguments; it may be empty.
	What string
	// Err is the errno, or an error that wraps one or errors.ErrUnsupported.
	Err error
}

// Error returns the operation, its object and arguments, and the cause.
func (e *OpError) Error() string {
	if e.What == "" {
		return e.Op + ": " + e.Err.Error()
	}
	return e.Op + " " + e.What + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// opError returns err as an OpError, or nil if err is nil.
func opError(err error, op, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, What: fmt.Sprintf(format, args...), Err: err}
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
