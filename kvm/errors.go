package kvm

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// OpError is a KVM call that failed: which ioctl (or system call), what it was
// about, and why. It reads like
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

// Error says what was attempted on what, and why it failed.
func (e *OpError) Error() string {
	if e.What == "" {
		return e.Op + ": " + e.Err.Error()
	}
	return e.Op + " " + e.What + ": " + e.Err.Error()
}

// Unwrap returns the cause.
func (e *OpError) Unwrap() error { return e.Err }

// opError wraps a kernel's refusal; nil stays nil.
func opError(err error, op, format string, args ...any) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, What: fmt.Sprintf(format, args...), Err: err}
}

// invalid is the cause of a call that was refused before the kernel saw it.
func invalid(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), unix.EINVAL)
}

// unsupported is the cause of a call that this kernel's KVM does not have.
func unsupported(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errors.ErrUnsupported)
}

// MSRError lists the MSRs that the kernel refused to read or write. Those that
// it took were transferred all the same: the error reports, it does not mean
// that nothing happened.
type MSRError struct {
	// Op is KVM_GET_MSRS or KVM_SET_MSRS.
	Op string
	// What says on which vCPU.
	What string
	// Refused has the indices of the MSRs, in the order they were passed.
	Refused []uint32
}

// Error names the refused MSRs by their index.
func (e *MSRError) Error() string {
	names := make([]string, len(e.Refused))
	for i, index := range e.Refused {
		names[i] = fmt.Sprintf("%#x", index)
	}
	return e.Op + " " + e.What + ": the kernel refused MSR " + strings.Join(names, ", ")
}
