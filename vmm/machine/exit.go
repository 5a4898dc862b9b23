package machine

import "fmt"

// ExitKind says how a machine ended.
type ExitKind uint8

// How a machine ends.
const (
	// ExitStopped: by [Machine.Stop].
	ExitStopped ExitKind = iota
	// ExitPowerOff: the guest switched itself off.
	ExitPowerOff
	// ExitReset: the guest asks to be started again, or a triple fault resets it, as it
	// does a PC.
	ExitReset
	// ExitCrash: the guest, or KVM, cannot go on.
	ExitCrash
)

// String returns what happened, to follow "the guest" or "the machine".
func (k ExitKind) String() string {
	switch k {
	case ExitStopped:
		return "was stopped"
	case ExitPowerOff:
		return "powered off"
	case ExitReset:
		return "was reset"
	case ExitCrash:
		return "crashed"
	}
	return fmt.Sprintf("ended (%d)", uint8(k))
}

// Exit is the end of a machine.
type Exit struct {
	Kind ExitKind
	Err  error // why it crashed, or the triple fault that resets it; otherwise nil
}

// EndedError is returned by calls that need a machine that has not ended.
type EndedError struct{ Exit Exit }

// Error says how the machine ended.
func (e *EndedError) Error() string {
	if e.Exit.Err != nil {
		return fmt.Sprintf("the guest %v: %v", e.Exit.Kind, e.Exit.Err)
	}
	return fmt.Sprintf("the guest %v", e.Exit.Kind)
}

// GuestEnded says so to the migration that ends with it.
func (e *EndedError) GuestEnded() bool { return true }

// Unwrap returns [Exit.Err].
func (e *EndedError) Unwrap() error { return e.Exit.Err }
