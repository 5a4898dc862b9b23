package main

import (
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/serial"
)

// A VM that was told to end at once (stop --force, a second signal) is given endTime. Then
// the process ends without it, whatever a device or storage does: what it does for the last
// time takes lastTime at most. Together they are less than the 5 s that are promised.
const (
	endTime  = 4 * time.Second
	lastTime = 400 * time.Millisecond
)

// endable is a VM whose end may hang.
type endable interface {
	Stopping() <-chan struct{}
	Awaits() (what string, freeing bool)
}

// watchdog ends the process when the VM was told to end at once and endTime later run has
// not returned. over is called when it has.
func (p *process) watchdog(vm endable, server *api.Server) (over func()) {
	done := make(chan struct{})
	go func() {
		select {
		case <-vm.Stopping():
		case <-done:
			return
		}
		select {
		case <-time.After(endTime):
		case <-done:
			return
		}
		os.Exit(p.endByForce(vm, server))
	}()
	return sync.OnceFunc(func() { close(done) })
}

// endByForce does what must be done before the process ends, as far as that is possible, and
// returns the exit status.
func (p *process) endByForce(vm endable, server *api.Server) int {
	status := exitDone
	if what, freeing := awaited(vm); freeing {
		p.say("%s: stopped", p.claim.Name())
	} else {
		status = exitFailed
		err := fmt.Errorf("%s did not end within %v, and is ended by force; it waits for %s", p.claim.Name(), endTime, what)
		p.log.Error(err.Error())
		server.Abandon(err)
	}
	atMost(lastTime, serial.RestoreTerminals, server.Shutdown, p.claim.Release, func() { flushLog(p.log) })
	p.farewell(status)
	return status
}

// awaited asks the VM, which may have no answer: it holds a lock for what hangs.
func awaited(vm endable) (what string, freeing bool) {
	type answer struct {
		what    string
		freeing bool
	}
	told := make(chan answer, 1)
	go func() {
		what, freeing := vm.Awaits()
		told <- answer{what, freeing}
	}()
	select {
	case a := <-told:
		return a.what, a.freeing
	case <-time.After(lastTime / 2):
		return "something that cannot be told", false
	}
}

// atMost calls all functions at once, and waits for so long.
func atMost(d time.Duration, functions ...func()) {
	var all sync.WaitGroup
	for _, f := range functions {
		all.Go(f)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		all.Wait()
	}()
	select {
	case <-ended:
	case <-time.After(d):
	}
}
