package machine

import (
	"errors"
	"sync"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
)

// TestPauseCycles pauses two busy vCPUs a thousand times. None may run while
// the machine is paused, and both go on after the resume.
func TestPauseCycles(t *testing.T) {
	m := newCounting(t)
	for i := range 1000 {
		check(t, m.Pause(t.Context()))
		bsp, ap := word(t, m, vmtest.CountAt), word(t, m, vmtest.APCountAt)
		if !m.Paused() {
			t.Fatal("Paused is false after Pause")
		}
		if now := word(t, m, vmtest.CountAt); now != bsp {
			t.Fatalf("cycle %d: vCPU 0 went on from %d to %d while paused", i, bsp, now)
		}
		if now := word(t, m, vmtest.APCountAt); now != ap {
			t.Fatalf("cycle %d: vCPU 1 went on from %d to %d while paused", i, ap, now)
		}
		check(t, m.Resume())
		if i%10 == 0 { // in the other cycles vCPUs may not have woken up at the next pause
			awaitChange(t, m, vmtest.CountAt, bsp)
			awaitChange(t, m, vmtest.APCountAt, ap)
		}
	}
	bsp, ap := word(t, m, vmtest.CountAt), word(t, m, vmtest.APCountAt)
	awaitChange(t, m, vmtest.CountAt, bsp)
	awaitChange(t, m, vmtest.APCountAt, ap)
	m.Stop()
	if exit := m.Exit(); exit.Kind != ExitStopped {
		t.Errorf("the machine %v", exit.Kind)
	}
}

// TestPauseWaiting pauses vCPUs that are blocked in the kernel: one halted with
// interrupts off, one that waits for SIPI.
func TestPauseWaiting(t *testing.T) {
	con := vmtest.NewTape()
	m := newMachine(t, 2, vmtest.Obey, con)
	check(t, m.Start(false))
	con.Await(t, "B")
	for range 50 { // vCPU 0 polls the serial port, vCPU 1 waits
		check(t, m.Pause(t.Context()))
		check(t, m.Resume())
	}
	con.Type("h")
	for range 200 {
		check(t, m.Pause(t.Context()))
		check(t, m.Pause(t.Context())) // a second pause does nothing
		check(t, m.Resume())
		check(t, m.Resume())
	}
}

// TestStartPaused: nothing runs before Resume.
func TestStartPaused(t *testing.T) {
	m := newMachine(t, 1, vmtest.JustCount, nil)
	if err := m.Resume(); err != nil || word(t, m, vmtest.CountAt) != 0 {
		t.Errorf("resume before the start: %v", err)
	}
	check(t, m.Start(true))
	check(t, m.Pause(t.Context()))
	if n := word(t, m, vmtest.CountAt); n != 0 || !m.Paused() {
		t.Errorf("started paused, and the guest counted to %d", n)
	}
	check(t, m.Resume())
	awaitChange(t, m, vmtest.CountAt, 0)
}

// TestPauseAgainstAll pauses, resumes and hands over from several goroutines,
// and stops the machine in the middle of it.
func TestPauseAgainstAll(t *testing.T) {
	for range 5 {
		m := newCounting(t)
		src := m.Source()
		var callers sync.WaitGroup
		call := func(f func() error) {
			callers.Go(func() {
				for {
					err := f()
					if ended := (*EndedError)(nil); errors.As(err, &ended) {
						return
					}
					if err != nil && !errors.Is(err, ErrHandoff) {
						t.Error(err)
						return
					}
				}
			})
		}
		call(func() error { return m.Pause(t.Context()) })
		call(func() error { return m.Pause(t.Context()) })
		call(m.Resume)
		call(func() error {
			_, err := src.PauseForHandoff(t.Context())
			if err != nil {
				return err
			}
			bsp := word(t, m, vmtest.CountAt)
			if now := word(t, m, vmtest.CountAt); now != bsp {
				t.Errorf("the guest runs while it is handed over")
			}
			return src.ResumeAfterAbort(vmtest.Within(t))
		})
		callers.Go(func() {
			for range 20 {
				_ = m.Pause(t.Context())
				_ = m.Resume()
			}
			m.Stop()
		})
		callers.Wait()
	}
}

// TestEndWhilePausing: the guest ends the machine while it is being paused. Whatever
// comes first, no call hangs.
func TestEndWhilePausing(t *testing.T) {
	for _, key := range []string{"p", "t", "r"} {
		for range 5 {
			con := vmtest.NewTape()
			m := newMachine(t, 2, vmtest.Obey, con)
			check(t, m.Start(false))
			con.Await(t, "B")
			con.Type(key)
			for range 300 {
				err := m.Pause(t.Context())
				if ended := (*EndedError)(nil); errors.As(err, &ended) {
					break
				}
				check(t, err)
				_ = m.Resume()
			}
			if exit := wait(t, m); exit.Kind == ExitStopped {
				t.Errorf("key %s: the machine %v", key, exit.Kind)
			}
		}
	}
}
