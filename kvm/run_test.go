package kvm

import (
	"bytes"
	"errors"
	"runtime"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

func TestPortIO(t *testing.T) {
	g := newRealModeGuest(t, newVM(t),
		0xe5, 0x40, // in $0x40, %ax
		0xba, 0xcd, 0xab, // mov $0xabcd, %dx
		0xef,             // out %ax, %dx
		0xb9, 0x04, 0x00, // mov $4, %cx
		0xbf, 0x00, 0x90, // mov $0x9000, %di
		0xf3, 0x6c, // rep insb
		0xf4, // hlt
	)
	g.next(t, ExitIO)
	io := g.IO()
	if io.Port != 0x40 || io.Size != 2 || io.Count != 1 || !io.In || len(io.Data) != 2 {
		t.Fatalf("%+v, want a read of two bytes at port 0x40", io)
	}
	copy(io.Data, []byte{0x34, 0x12})
	g.next(t, ExitIO)
	io = g.IO()
	if io.Port != 0xabcd || io.In || !bytes.Equal(io.Data, []byte{0x34, 0x12}) {
		t.Fatalf("%+v, want a write of what was read", io)
	}
	sent := byte('a')
	for sent < 'a'+4 {
		g.next(t, ExitIO)
		if io = g.IO(); io.Port != 0xabcd || !io.In || io.Size != 1 || len(io.Data) != io.Count {
			t.Fatalf("%+v, want a string read", io)
		}
		for i := range io.Data {
			io.Data[i] = sent
			sent++
		}
	}
	g.next(t, ExitHLT)
	if got := g.low[0x9000:0x9005]; string(got) != "abcd\x00" {
		t.Errorf("string read left %q", got)
	}
}

func TestMMIO(t *testing.T) {
	g := newRing3Guest(t, newVM(t),
		0x8b, 0x01, // mov (%rcx), %eax
		0x89, 0x41, 0x10, // mov %eax, 0x10(%rcx)
	)
	g.next(t, ExitMMIO)
	m := g.MMIO()
	if m.Addr != nowhere || m.Write || len(m.Data) != 4 {
		t.Fatalf("%+v, want a read of four bytes", m)
	}
	copy(m.Data, "wxyz")
	g.next(t, ExitMMIO)
	if m = g.MMIO(); m.Addr != nowhere+0x10 || !m.Write || string(m.Data) != "wxyz" {
		t.Fatalf("%+v, want a write of what was read", m)
	}
}

// A triple fault is a shutdown exit.
func TestTripleFault(t *testing.T) {
	g := newRing3Guest(t, newVM(t), 0x0f, 0x0b) // ud2
	s := must(g.GetSregs())(t)
	s.IDT.Limit = 0 // no exception can be delivered
	check(t, g.SetSregs(s))
	g.next(t, ExitShutdown)
}

// With immediate exit, Run does not enter the guest, but completes the access of the
// last exit, so that the guest's memory and registers are consistent.
func TestImmediateExit(t *testing.T) {
	g := newRealModeGuest(t, newVM(t),
		0xe4, 0x40, // in $0x40, %al
		0xf4, // hlt
	)
	g.SetImmediateExit(true)
	for range 3 {
		if err := g.Run(); err != unix.EINTR {
			t.Fatalf("Run: %v", err)
		}
	}
	if r := must(g.GetRegs())(t); r.RIP != codeAt {
		t.Errorf("RIP %#x: the guest ran", r.RIP)
	}
	g.SetImmediateExit(false)
	g.next(t, ExitIO)
	g.IO().Data[0] = 0x5a
	g.complete(t)
	if r := must(g.GetRegs())(t); r.RIP != codeAt+2 || r.RAX&0xff != 0x5a {
		t.Errorf("RIP %#x RAX %#x: the read did not complete", r.RIP, r.RAX)
	}
	g.next(t, ExitHLT)
}

// The other bytes of the word with immediate_exit do not change.
func TestImmediateExitStore(t *testing.T) {
	v := newVCPU(t, newVM(t))
	v.area[0], v.area[2], v.area[3] = 1, 2, 3
	v.SetImmediateExit(true)
	if want := []byte{1, 1, 2, 3}; !bytes.Equal(v.area[:4], want) {
		t.Errorf("set: %v, want %v", v.area[:4], want)
	}
	v.SetImmediateExit(false)
	if want := []byte{1, 0, 2, 3}; !bytes.Equal(v.area[:4], want) {
		t.Errorf("cleared: %v, want %v", v.area[:4], want)
	}
}

// spinner runs a guest that never exits on its own thread until it is stopped. The
// guest increments counter.
type spinner struct {
	*testGuest
	counter *uint32
	stop    atomic.Bool
	done    chan error
}

func startSpinner(g *testGuest) *spinner {
	s := &spinner{testGuest: g, counter: (*uint32)(unsafe.Pointer(&g.low[0x8000])), done: make(chan error)}
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		g.BindThread()
		defer g.UnbindThread()
		for {
			err := g.Run()
			if !errors.Is(err, unix.EINTR) || s.stop.Load() {
				s.done <- err
				return
			}
		}
	}()
	return s
}

// waitRunning returns when the guest has incremented the counter: it is in KVM_RUN.
func (s *spinner) waitRunning() {
	for before := atomic.LoadUint32(s.counter); atomic.LoadUint32(s.counter) == before; {
		runtime.Gosched()
	}
}

// kick stops the guest and waits for its thread.
func (s *spinner) kick(t *testing.T) {
	t.Helper()
	s.stop.Store(true)
	check(t, s.Kick())
	if err := <-s.done; err != unix.EINTR {
		t.Fatalf("Run of a kicked vCPU: %v", err)
	}
}

// Kick ends a KVM_RUN that would never exit, with native and with emulated code, and
// a KVM_RUN that has not started yet.
func TestKick(t *testing.T) {
	for _, c := range []struct {
		name  string
		guest *testGuest
	}{
		{"ring 3", newRing3Guest(t, newVM(t), 0xff, 0x04, 0x25, 0x00, 0x80, 0x00, 0x00, 0xeb, 0xf7)}, // incl 0x8000; jmp
		{"real mode", newRealModeGuest(t, newVM(t), 0x66, 0xff, 0x06, 0x00, 0x80, 0xeb, 0xf9)},       // incl 0x8000; jmp
	} {
		t.Run(c.name, func(t *testing.T) {
			for i := range 100 {
				s := startSpinner(c.guest)
				if i%2 == 0 { // otherwise the kick may come before KVM_RUN
					s.waitRunning()
				}
				s.kick(t)
				// It stays set until it is cleared.
				if err := s.Run(); err != unix.EINTR {
					t.Fatalf("Run after a kick: %v", err)
				}
				s.SetImmediateExit(false)
			}
		})
	}
}

// A thread that calls UnbindThread late does not unbind its successor.
func TestUnbindThreadOfAnother(t *testing.T) {
	v := newVCPU(t, newVM(t))
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	v.BindThread()
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		v.UnbindThread()
	}()
	<-done
	if v.tid != unix.Gettid() {
		t.Errorf("thread %d is bound, want %d", v.tid, unix.Gettid())
	}
	v.UnbindThread()
	if v.tid != 0 {
		t.Errorf("thread %d is still bound", v.tid)
	}
}

// Kicks may come at any time, also after the vCPU is closed.
func TestKickAndClose(t *testing.T) {
	vm := newVM(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	for id := range 20 {
		v := must(vm.CreateVCPU(id))(t)
		v.BindThread()
		stop, done := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(done)
			for {
				select {
				case <-stop:
					return
				default:
					if err := v.Kick(); err != nil {
						t.Error(err)
					}
				}
			}
		}()
		v.UnbindThread()
		check(t, v.Close())
		close(stop)
		<-done
	}
}

// Run and the decoding of an exit allocate nothing.
func TestRunDoesNotAllocate(t *testing.T) {
	g := newRing3Guest(t, newVM(t), 0x88, 0x01, 0xeb, 0xfc) // mov %al, (%rcx); jmp
	g.SetImmediateExit(true)
	if n := testing.AllocsPerRun(100, func() {
		if g.Run() != unix.EINTR {
			t.Error("Run with immediate exit")
		}
	}); n != 0 {
		t.Errorf("%v allocations in a Run that was kicked", n)
	}
	g.SetImmediateExit(false)
	var sum int
	if n := testing.AllocsPerRun(100, func() {
		if err := g.Run(); err == nil && g.ExitReason() == ExitMMIO {
			sum += len(g.MMIO().Data) + len(g.IO().Data)
		}
	}); n != 0 {
		t.Errorf("%v allocations in a Run and its exit", n)
	}
	if sum == 0 {
		t.Error("the guest never exited")
	}
}

// BenchmarkExit measures an MMIO exit and the next entry.
func BenchmarkExit(b *testing.B) {
	g := newRing3Guest(b, newVM(b), 0x88, 0x01, 0xeb, 0xfc)
	b.ReportAllocs()
	for b.Loop() {
		if err := g.Run(); err != nil && !errors.Is(err, unix.EINTR) {
			b.Fatal(err)
		}
	}
}
