package mempage

import (
	"fmt"
	"runtime/debug"
)

// Fault is the error of an access to guest memory for which the host has no page: its
// hardware has failed there (hwpoison), or the pool or file behind it has none. The
// kernel sends SIGBUS for such an access, which otherwise ends the process.
type Fault struct {
	Addr uintptr // in this process
}

func (f *Fault) Error() string {
	return fmt.Sprintf("memory at %#x of this process: the host cannot access the page: its hardware has failed, or there is no memory for it", f.Addr)
}

// Guard calls f and returns its error. If an access of f, in this goroutine, faults at
// an address other than nearly nil, the rest of f is not executed, except for what is
// deferred, and the error is a [*Fault]. It allocates nothing if all is well.
func Guard(f func() error) (err error) {
	before := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(before)
		r := recover()
		if r == nil {
			return
		}
		at, ok := r.(interface{ Addr() uintptr }) // see debug.SetPanicOnFault
		if !ok {
			panic(r)
		}
		err = &Fault{at.Addr()}
	}()
	return f()
}
