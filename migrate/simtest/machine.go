package simtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
)

// Config describes a simulated machine. It is the machine's migration configuration.
type Config struct {
	Layout
	// CPUs is the number of vCPUs.
	CPUs int
	// Seed determines which pages each vCPU writes, and in which order. How vCPUs
	// interleave is up to the scheduler.
	Seed uint64
	// Dirty is how many pages at the start of each slot the guest writes; 0: all.
	Dirty uint64
	// Rate is how many pages a second each vCPU writes; 0: as many as it can.
	Rate uint64
	// Devices, Punches and KernelWrites are how many of 1000 writes are by a device,
	// give a page back to the host, and are by KVM itself.
	Devices, Punches, KernelWrites int
	// Fill gives that many pages of each slot content before the guest starts.
	Fill uint64
	// Balloon gives the machine a [Balloon].
	Balloon bool
	// Disks are the sizes of the machine's disks in bytes, multiples of 512.
	Disks []uint64
	// DiskWrites is how many of 1000 writes are to a disk, DiskDirty how many bytes at the
	// start of each disk the guest writes; 0: all.
	DiskWrites int
	DiskDirty  uint64
	// DiskFill gives that many bytes of each disk content before the guest starts.
	DiskFill uint64
}

// Steps are called at the steps of a machine's life. A nil hook is not
// called; an error of a hook is the step's.
type Steps struct {
	Config  func() error
	Flush   func(context.Context) error // before the stop
	Pause   func(context.Context) error // after the vCPUs have stopped
	Save    func() error
	Sample  func() error                // the storage, at the source; at the same time as Save
	Unlock  func(context.Context) error // before Yield
	Yield   func() error                // before COMMIT
	Compare func() error                // the storage, at the destination; some pages may not have landed
	Prepare func() error                // some pages may not have landed
	Missing func() error                // asked whether memory may come later
	Load    func() error
	Unload  func() error
	Start   func() error // before any vCPU enters the guest
	Resume  func() error
}

// Machine is a simulated machine. It implements [migrate.Source] and
// [migrate.Target].
type Machine struct {
	*Memory
	// Steps is set before the machine is used.
	Steps Steps
	// Balloon is nil unless the configuration has one.
	Balloon *Balloon
	// Storage is what is on the disk that the machine reaches. It is set before the
	// machine is used.
	Storage string

	config Config
	world  *World
	disks  []*Disk
	// sharedDisks is how many of them, the first ones, are those of the source.
	sharedDisks int
	// throttle is the percentage of time in which vCPUs do not write, throttled the
	// highest that it has been.
	throttle, throttled atomic.Int32

	mu       sync.Mutex // guards the fields below; held while vCPUs start and stop
	phase    phase
	wasRun   bool // before PauseForHandoff
	prepared *state
	loaded   bool
	cpus     []*vcpu
}

// phase is where a machine is in its life.
type phase string

const (
	building  phase = "being built"
	paused    phase = "paused"
	running   phase = "running"
	handedOff phase = "stopped for the handoff"
	discarded phase = "discarded"
)

var (
	_ migrate.Source    = (*Machine)(nil)
	_ migrate.Target    = (*Machine)(nil)
	_ migrate.Throttler = (*Machine)(nil)
	_ migrate.Sampler   = (*Machine)(nil)
	_ migrate.Comparer  = (*Machine)(nil)

	_ migrate.DiskSource = (*Machine)(nil)
	_ migrate.DiskTarget = (*Machine)(nil)
)

// NewMachine makes the machine on which the guest of a world begins, paused.
func NewMachine(w *World, c Config) (*Machine, error) {
	m, err := newMachine(w, c)
	if err != nil {
		return nil, err
	}
	m.phase = paused
	for slot, s := range m.Slots() {
		for page := range min(c.Fill, s.Pages) {
			m.GuestWrite(slot, page)
		}
	}
	for i, d := range m.disks {
		random := rand.NewChaCha8([32]byte{byte(i + 1)})
		p := make([]byte, min(c.DiskFill, d.Size()))
		_, _ = random.Read(p)
		if err := d.Write(p, 0); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func newMachine(w *World, c Config) (*Machine, error) {
	if c.CPUs < 1 || len(c.Slots) == 0 {
		return nil, fmt.Errorf("simulate a machine: %d vCPUs and %d memory slots: must be at least 1", c.CPUs, len(c.Slots))
	}
	memory, err := NewMemory(c.Layout)
	if err != nil {
		return nil, err
	}
	return newMachineIn(w, c, memory)
}

// newMachineIn makes a machine in memory that there is.
func newMachineIn(w *World, c Config, memory *Memory) (*Machine, error) {
	m := &Machine{Memory: memory, config: c, world: w, phase: building}
	for i := range c.CPUs {
		m.cpus = append(m.cpus, newVCPU(m, i))
	}
	if c.Balloon {
		m.Balloon = newBalloon(m)
	}
	for i, size := range c.Disks {
		m.disks = append(m.disks, newDisk(i, size))
	}
	w.add(m)
	return m, nil
}

// Resume lets the guest run, as a user does.
func (m *Machine) Resume() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != paused {
		return fmt.Errorf("resume a simulated machine: it is %s", m.phase)
	}
	m.enter()
	return nil
}

// Pause stops the guest, as a user does.
func (m *Machine) Pause() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != running {
		return fmt.Errorf("pause a simulated machine: it is %s", m.phase)
	}
	m.leave()
	m.phase = paused
	return nil
}

// Running reports whether the guest's vCPUs run here.
func (m *Machine) Running() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.phase == running
}

// Discarded reports whether the machine was given up as a destination.
func (m *Machine) Discarded() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.phase == discarded
}

// Writes is the number of writes that each vCPU has made since the guest began, on all
// machines.
func (m *Machine) Writes() []uint64 {
	out := make([]uint64, len(m.cpus))
	for i, v := range m.cpus {
		out[i] = v.writes.Load()
	}
	return out
}

// enter starts the vCPUs. It needs mu.
func (m *Machine) enter() {
	m.phase = running
	m.world.runs(m, true)
	for _, v := range m.cpus {
		v.start()
	}
	if m.Balloon != nil {
		m.Balloon.start()
	}
}

// leave stops the vCPUs and waits for them. It needs mu.
func (m *Machine) leave() {
	for _, v := range m.cpus {
		v.stop()
	}
	if m.Balloon != nil {
		m.Balloon.stop()
	}
	m.world.runs(m, false)
}

// stop stops all goroutines of the machine.
func (m *Machine) stop() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase == running {
		m.leave()
		m.phase = paused
	}
	if b := m.Balloon; b != nil {
		b.resume()
		close(b.closed)
	}
}

// MigrationConfig implements [migrate.Source].
func (m *Machine) MigrationConfig() ([]byte, error) {
	if err := call(m.Steps.Config); err != nil {
		return nil, err
	}
	return json.Marshal(m.config)
}

// Paused implements [migrate.Source].
func (m *Machine) Paused() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.phase == paused
}

// PrepareStop implements [migrate.Source].
func (m *Machine) PrepareStop(ctx context.Context) error {
	if m.Steps.Flush == nil {
		return nil
	}
	return m.Steps.Flush(ctx)
}

// PauseForHandoff implements [migrate.Source]. Each vCPU completes a port read whose data
// KVM writes to memory, and each device completes a write: a sender that does not fetch
// the log once more loses them.
func (m *Machine) PauseForHandoff(ctx context.Context) (wasRunning bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != running && m.phase != paused {
		return false, fmt.Errorf("pause a simulated machine for the handoff: it is %s", m.phase)
	}
	wasRunning = m.phase == running
	if wasRunning {
		m.leave()
	}
	m.wasRun, m.phase = wasRunning, handedOff
	m.Balloon.pause()
	if m.Steps.Pause != nil {
		if err := m.Steps.Pause(ctx); err != nil {
			return wasRunning, err
		}
	}
	if wasRunning {
		for _, v := range m.cpus {
			slot, page := v.place()
			m.KernelWrite(slot, page)()
			slot, page = v.place()
			m.DeviceWrite(slot, page)()
			if m.config.DiskWrites > 0 {
				v.writeDisk()
			}
		}
	}
	return wasRunning, nil
}

// SampleStorage implements [migrate.Sampler].
func (m *Machine) SampleStorage(_ context.Context, session [16]byte) ([]byte, error) {
	if err := call(m.Steps.Sample); err != nil {
		return nil, err
	}
	return fmt.Appendf(nil, "%x %s", session, m.Storage), nil
}

// CompareStorage implements [migrate.Comparer].
func (m *Machine) CompareStorage(_ context.Context, session [16]byte, samples []byte) error {
	if err := call(m.Steps.Compare); err != nil {
		return err
	}
	if here := fmt.Sprintf("%x %s", session, m.Storage); here != string(samples) {
		return kind.Told(fmt.Errorf("compare the storage of a simulated machine: expected %.100q, found %.100q", samples, here))
	}
	return nil
}

// YieldForHandoff implements [migrate.Source]: the right to run goes once, with
// the machine stopped.
func (m *Machine) YieldForHandoff(ctx context.Context) error {
	if m.Steps.Unlock != nil {
		if err := m.Steps.Unlock(ctx); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != handedOff {
		return fmt.Errorf("yield a simulated machine: it is %s", m.phase)
	}
	return call(m.Steps.Yield)
}

// ResumeAfterAbort implements [migrate.Source].
func (m *Machine) ResumeAfterAbort(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != handedOff {
		return fmt.Errorf("resume a simulated machine after the handoff was given up: it is %s", m.phase)
	}
	if err := call(m.Steps.Resume); err != nil {
		return err
	}
	m.phase = paused
	m.Balloon.resume()
	if m.wasRun {
		m.enter()
	}
	return nil
}

// state is what SaveState returns, as JSON.
type state struct {
	Clock uint64 // number of the last write
	CPUs  []cpuState

	Balloon balloonState
}

// Throttle implements [migrate.Throttler].
func (m *Machine) Throttle(percent int) error {
	if percent < 0 || percent > 99 {
		return fmt.Errorf("throttle a simulated machine to %d%%", percent)
	}
	m.throttle.Store(int32(percent))
	m.throttled.Store(max(m.throttled.Load(), int32(percent)))
	return nil
}

// Throttled returns by how many percent the vCPUs are slowed down now, and the highest
// percentage so far.
func (m *Machine) Throttled() (now, most int) {
	return int(m.throttle.Load()), int(m.throttled.Load())
}

// SaveState implements [migrate.Source].
func (m *Machine) SaveState(context.Context) ([]byte, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != handedOff {
		return nil, fmt.Errorf("save the state of a simulated machine: it is %s", m.phase)
	}
	if err := call(m.Steps.Save); err != nil {
		return nil, err
	}
	s := state{Clock: m.clock.last.Load()}
	for _, v := range m.cpus {
		cpu, err := v.save()
		if err != nil {
			return nil, err
		}
		s.CPUs = append(s.CPUs, cpu)
	}
	if m.Balloon != nil {
		s.Balloon = m.Balloon.save()
	}
	return json.Marshal(s)
}

// PrepareState implements [migrate.Target].
func (m *Machine) PrepareState(saved []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != building || m.loaded {
		return fmt.Errorf("prepare a simulated machine: it is %s, loaded: %v", m.phase, m.loaded)
	}
	if err := call(m.Steps.Prepare); err != nil {
		return err
	}
	s := new(state)
	if err := json.Unmarshal(saved, s); err != nil {
		return fmt.Errorf("prepare a simulated machine: %w", err)
	}
	if len(s.CPUs) != len(m.cpus) {
		return fmt.Errorf("prepare a simulated machine: the state has %d vCPUs, expected %d", len(s.CPUs), len(m.cpus))
	}
	m.prepared = s
	return nil
}

// LoadState implements [migrate.Target].
func (m *Machine) LoadState(context.Context, []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != building || m.loaded || m.prepared == nil {
		return fmt.Errorf("load the state of a simulated machine: it is %s, prepared: %v, loaded: %v", m.phase, m.prepared != nil, m.loaded)
	}
	if err := call(m.Steps.Load); err != nil {
		return err
	}
	for slot := range m.Slots() { // as rings are
		m.Fetch(slot, 0, nil)
	}
	s := m.prepared
	m.clock.last.Store(s.Clock)
	for i, v := range m.cpus {
		if err := v.load(s.CPUs[i]); err != nil {
			return err
		}
	}
	if m.Balloon != nil {
		m.Balloon.load(s.Balloon)
	}
	m.loaded = true
	return nil
}

// UnloadState implements [migrate.Target].
func (m *Machine) UnloadState(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != building || !m.loaded {
		return fmt.Errorf("unload a simulated machine: it is %s, loaded: %v", m.phase, m.loaded)
	}
	m.prepared, m.loaded = nil, false
	return call(m.Steps.Unload)
}

// Start implements [migrate.Target]. Before a vCPU enters the guest the world
// compares its memory with the source's.
func (m *Machine) Start(_ context.Context, stayPaused bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != building || !m.loaded {
		return fmt.Errorf("start a simulated machine: it is %s, loaded: %v", m.phase, m.loaded)
	}
	if err := call(m.Steps.Start); err != nil {
		return err
	}
	m.world.arrived(m)
	m.phase = paused
	if !stayPaused {
		m.enter()
	}
	return nil
}

// Discard implements [migrate.Target]. The memory stays mapped until the world
// is closed, so that a test can look at it.
func (m *Machine) Discard() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.phase != building {
		return errors.New("discard a simulated machine: it has got the right to run")
	}
	m.phase = discarded
	return nil
}

func call(hook func() error) error {
	if hook == nil {
		return nil
	}
	return hook()
}
