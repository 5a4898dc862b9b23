package migrate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/govmm/govmm/mempage"
)

// patientSource is a source whose steps take time, and whose guest writes all memory in
// every round until it is stopped.
type patientSource struct {
	*toySource
	takes   map[string]time.Duration // of a step
	busy    bool                     // the guest writes
	state   []byte
	stopped bool
}

func (s *patientSource) takesIts(step string) { time.Sleep(s.takes[step]) }

func (s *patientSource) StartDirtyLog() error {
	s.takesIts("log on")
	return nil
}

func (s *patientSource) FetchDirtyLog(slot int, bm []uint64) error {
	s.takesIts("fetch")
	clear(bm)
	if s.busy && !s.stopped {
		for page := range s.Slots()[slot].Pages {
			bm[page/64] |= 1 << (page % 64)
		}
	}
	return nil
}

func (s *patientSource) MigrationConfig() ([]byte, error) {
	s.takesIts("config")
	return []byte("config"), nil
}

func (s *patientSource) PauseForHandoff(ctx context.Context) (bool, error) {
	s.takesIts("pause")
	s.stopped = true
	return s.toySource.PauseForHandoff(ctx)
}

func (s *patientSource) SaveState(context.Context) ([]byte, error) {
	s.takesIts("save")
	return append([]byte(nil), s.state...), nil
}

func (s *patientSource) YieldForHandoff(ctx context.Context) error {
	s.takesIts("yield")
	return s.toySource.YieldForHandoff(ctx)
}

// patientTarget is a target whose steps take time.
type patientTarget struct {
	*toyTarget
	takes map[string]time.Duration
}

func (d *patientTarget) Populated(slot int, first, n uint64, bm []uint64) error {
	time.Sleep(d.takes["look"])
	return d.toyTarget.Populated(slot, first, n, bm)
}

func (d *patientTarget) PrepareState(b []byte) error {
	time.Sleep(d.takes["prepare"])
	return d.toyTarget.PrepareState(b)
}

func (d *patientTarget) LoadState(ctx context.Context, b []byte) error {
	time.Sleep(d.takes["load"])
	return d.toyTarget.LoadState(ctx, b)
}

func (d *patientTarget) Start(ctx context.Context, paused bool) error {
	time.Sleep(d.takes["start"])
	return d.toyTarget.Start(ctx, paused)
}

// migrateSlowly migrates over a network in a bubble, and returns what the source and the
// destination say.
func migrateSlowly(t *testing.T, n *slowNet, busy bool, takes map[string]time.Duration, opt Options) (r Result, line string, err error) {
	opt.Dial = n.Dial
	return migrateOver(t, n, n, busy, takes, opt)
}

func migrateOver(t *testing.T, n *slowNet, ln net.Listener, busy bool, takes map[string]time.Duration, opt Options) (r Result, line string, err error) {
	runs := &whoRuns{t: t, who: map[string]bool{}}
	src := &patientSource{toySource: newToySource(t, runs), takes: takes, busy: busy, state: []byte("state")}
	var target *patientTarget
	lines := make(chan string, 16)
	recv := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
		time.Sleep(takes["build"])
		toy := &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs}
		target = &patientTarget{toyTarget: toy, takes: takes}
		return target, nil
	}), newLineLog(lines))
	if over, ok := ln.(tlsListener); ok {
		recv.tls = over.config // also one that RequireTLS would refuse
		if config, err := serverTLS(over.config); err == nil {
			recv.tls = config
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	var served sync.WaitGroup
	served.Go(func() { _ = recv.Serve(ctx, ln) })
	m := New(src, "there", opt)
	_, err = m.Run(context.Background())
	line = <-lines
	cancel()
	served.Wait()
	n.carriers.Wait()
	if err == nil {
		<-recv.Arrived()
		for i := range src.mem {
			if !bytes.Equal(src.mem[i], target.mem[i]) {
				t.Errorf("slot %d differs", i)
			}
		}
	}
	if runs.is("source") == (err == nil) || runs.is("destination") != (err == nil) {
		t.Errorf("%v, and the source runs: %v, the destination: %v", err, runs.is("source"), runs.is("destination"))
	}
	return m.Result(), line, err
}

// A slow link is only slow: with socket buffers of 4 KiB and of 4 MiB, a guest that is
// idle and one that leaves its whole memory to the stop. A frame takes minutes of the
// bubble's time, and a confirmation waits for all that the buffers hold.
func TestSlowIsNotDead(t *testing.T) {
	for _, rate := range []int{100e3 / 8, 1e6, 1e9} {
		for _, buffer := range []int{4 << 10, 4 << 20} {
			for _, channels := range []int{1, 16} {
				for _, busy := range []bool{false, true} {
					t.Run(fmt.Sprintf("%d bytes a second, buffers of %d, %d channels, busy %v", rate, buffer, channels, busy), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							o := Options{Channels: channels, DowntimeLimit: 5 * time.Minute, VerifyPages: true}
							r, line, err := migrateSlowly(t, newSlowNet(rate, buffer), busy, nil, o)
							if err != nil {
								t.Fatalf("%v; the destination: %s", err, line)
							}
							if busy && rate < 1e6 && r.Downtime < 20*time.Second {
								t.Errorf("a downtime of %v: nothing was left to the stop", r.Downtime)
							}
						})
					})
				}
			}
		}
	}
}

// A side that works and says nothing else for five minutes lives.
func TestSilentWorkIsNotDeath(t *testing.T) {
	for _, step := range []string{"config", "build", "log on", "fetch", "pause", "save", "look", "prepare", "load", "yield", "start"} {
		t.Run(step, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				took := 5 * time.Minute
				switch step {
				case "fetch": // there are several, one after another
					took = time.Minute
				case "start": // then the source asks
					took = 50 * time.Second
				}
				began := time.Now()
				_, line, err := migrateSlowly(t, newSlowNet(1e9, 64<<10), false, map[string]time.Duration{step: took},
					Options{Channels: 1, DowntimeLimit: time.Hour, VerifyPages: step == "look", Timeout: 24 * time.Hour})
				if err != nil {
					t.Fatalf("%v; the destination: %s", err, line)
				}
				if time.Since(began) < took {
					t.Error("the step was not made")
				}
			})
		})
	}
}

// One connection stops to deliver, in one direction, while all others do: neither side is
// silent, and each waits for the other.
func TestALostConnectionIsNoticed(t *testing.T) {
	for dialled := range 4 {
		for _, back := range []bool{false, true} {
			if dialled > 0 && back {
				continue // nothing goes there
			}
			for _, after := range []int{120, 3000} { // before COMMIT, whose loss a query makes good
				t.Run(fmt.Sprintf("connection %d, back %v, after %d bytes", dialled, back, after), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) {
						n := newSlowNet(1e9, 16<<10)
						var mu sync.Mutex
						passed := 0
						n.lose = func(d int, b bool, chunk []byte) bool {
							mu.Lock()
							defer mu.Unlock()
							if d == dialled && b == back {
								passed += len(chunk)
								return passed > after
							}
							return false
						}
						began := time.Now()
						o := Options{Channels: 3, DowntimeLimit: time.Hour, Timeout: 24 * time.Hour}
						_, line, err := migrateSlowly(t, n, true, nil, o)
						if took := time.Since(began); took > 10*time.Minute {
							t.Errorf("after %v: %v; %s", took, err, line)
						}
						mu.Lock()
						defer mu.Unlock()
						if err == nil && passed > after && dialled > 0 { // what follows COMMIT, the source asks for
							t.Error("it was lost, and the migration completed")
						}
						if err != nil && !strings.Contains(err.Error(), "stuck") && !strings.Contains(err.Error(), "silent") {
							t.Errorf("%v; %s", err, line)
						}
					})
				})
			}
		}
	}
}

// A peer that vanishes is dead after PeerTimeout, whatever was under way.
func TestSilenceIsDeath(t *testing.T) {
	for _, after := range []int{1, 3, 30, 60, 90} {
		synctest.Test(t, func(t *testing.T) {
			n := newSlowNet(100e3, 16<<10)
			var mu sync.Mutex
			passed, lost := 0, time.Time{}
			n.lose = func(int, bool, []byte) bool {
				mu.Lock()
				defer mu.Unlock()
				if passed++; passed == after {
					lost = time.Now()
				}
				return passed >= after
			}
			_, _, err := migrateSlowly(t, n, true, nil, Options{Channels: 2, DowntimeLimit: time.Hour})
			if err == nil || errors.Is(err, ErrHandoffUnknown) {
				t.Fatal(err)
			}
			if took := time.Since(lost); took < 9*time.Second || took > 25*time.Second {
				t.Errorf("after %d chunks it took %v: %v", after, took, err)
			}
		})
	}
}
