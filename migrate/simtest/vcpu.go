package simtest

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
)

// vcpu is a simulated vCPU: a goroutine that writes memory while it is in the guest. Its
// random numbers are its registers, and move with it.
type vcpu struct {
	machine *Machine
	source  *rand.PCG
	random  *rand.Rand
	writes  atomic.Uint64

	quit chan struct{} // closed to kick it out of the guest
	wg   sync.WaitGroup
}

// cpuState is the state of a vCPU.
type cpuState struct {
	Random []byte // of math/rand/v2.PCG
	Writes uint64
}

func newVCPU(m *Machine, id int) *vcpu {
	source := rand.NewPCG(m.config.Seed, uint64(id))
	return &vcpu{machine: m, source: source, random: rand.New(source)}
}

func (v *vcpu) save() (cpuState, error) {
	random, err := v.source.MarshalBinary()
	if err != nil {
		return cpuState{}, fmt.Errorf("save a simulated vCPU: %w", err)
	}
	return cpuState{Random: random, Writes: v.writes.Load()}, nil
}

func (v *vcpu) load(s cpuState) error {
	if err := v.source.UnmarshalBinary(s.Random); err != nil {
		return fmt.Errorf("load a simulated vCPU: %w", err)
	}
	v.writes.Store(s.Writes)
	return nil
}

// start and stop are called by the machine, which owns the goroutine.
func (v *vcpu) start() {
	v.quit = make(chan struct{})
	v.wg.Go(v.run)
}

func (v *vcpu) stop() {
	close(v.quit)
	v.wg.Wait()
}

// slice is how long a vCPU writes before it checks whether it was kicked.
const slice = time.Millisecond

func (v *vcpu) run() {
	batch := uint64(256)
	if rate := v.machine.config.Rate; rate > 0 {
		batch = max(1, rate*uint64(slice)/uint64(time.Second))
	}
	next := time.Now()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-v.quit:
			return
		case <-timer.C:
		}
		began := time.Now()
		for range batch {
			v.write()
		}
		var wait time.Duration
		if rate := v.machine.config.Rate; rate > 0 {
			next = next.Add(time.Duration(batch * uint64(time.Second) / rate))
			wait = time.Until(next)
		}
		if share := time.Duration(v.machine.throttle.Load()); share > 0 {
			// It rests in proportion to the time that it worked or waited, and does
			// not catch up later.
			rest := max(time.Since(began), wait) * share / (100 - share)
			next = next.Add(rest)
			wait += rest
		}
		timer.Reset(wait)
	}
}

// place draws a page of those that the guest writes.
func (v *vcpu) place() (slot int, page uint64) {
	slots := v.machine.config.Slots
	slot = v.random.IntN(len(slots))
	pages := slots[slot].Pages
	if d := v.machine.config.Dirty; d > 0 {
		pages = min(pages, d)
	}
	return slot, v.random.Uint64N(pages)
}

// write is one write by the vCPU, or by what it causes to write.
func (v *vcpu) write() {
	c := &v.machine.config
	slot, page := v.place()
	if !v.machine.Fetch(slot, page, v.quit) {
		return // kicked out of the guest
	}
	switch lot := v.random.IntN(1000); {
	case lot < c.Devices:
		v.machine.DeviceWrite(slot, page)()
	case lot < c.Devices+c.Punches:
		v.machine.Punch(slot, page, 1, true)
	case lot < c.Devices+c.Punches+c.KernelWrites:
		v.machine.KernelWrite(slot, page)()
	case lot < c.Devices+c.Punches+c.KernelWrites+c.DiskWrites:
		v.writeDisk()
	case lot%100 == 99:
		v.machine.GuestZero(slot, page)
	default:
		v.machine.GuestWrite(slot, page)
	}
	v.writes.Add(1)
}
