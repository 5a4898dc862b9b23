package simtest

import (
	"encoding/binary"
	"fmt"
	"strings"
	"sync/atomic"

	"github.com/govmm/govmm/mempage"
)

// clock numbers the writes of a guest, on all machines.
type clock struct{ last atomic.Uint64 }

func (c *clock) tick() uint64 { return c.last.Add(1) }

// Writer is who wrote.
type Writer uint8

const (
	Guest  Writer = iota // a vCPU's store
	Kernel               // KVM itself: kvmclock, steal time, the data of a port read
	Device               // the VMM's process
	Punch                // memory given back to the host
)

func (w Writer) String() string {
	return [...]string{"guest", "kernel", "device", "punch"}[w]
}

// Write is the record of one write.
type Write struct {
	Seq     uint64 // numbers all writes of the machine, from 1
	By      Writer
	Zero    bool // the page was filled with zeros, otherwise stamped with Seq
	Faulted bool // the page was armed
	Logged  bool // a log has had the page since
}

func (w Write) String() string {
	s := fmt.Sprintf("#%d by %s", w.Seq, w.By)
	if w.Zero {
		s += ", zeros"
	}
	if w.Faulted {
		s += ", faulted"
	}
	if !w.Logged {
		s += ", unlogged"
	}
	return s
}

// history keeps the last writes of one page.
type history struct {
	last [8]Write
	n    uint64
}

func (p *page) record(w Write) {
	if p.history == nil {
		p.history = new(history)
	}
	h := p.history
	h.last[h.n%uint64(len(h.last))] = w
	h.n++
}

// History returns the last writes to a page, up to 8, the oldest first.
func (m *Memory) History(slot int, page uint64) []Write {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.pages[page].history
	if h == nil {
		return nil
	}
	var out []Write
	size := uint64(len(h.last))
	for i := h.n - min(h.n, size); i < h.n; i++ {
		out = append(out, h.last[i%size])
	}
	return out
}

// GuestWrite is a vCPU's store: it stamps the page with the number of the write. An armed
// page faults first, which records it. A hole becomes populated.
func (m *Memory) GuestWrite(slot int, page uint64) Write {
	return m.guestWrite(slot, page, false)
}

// GuestZero is a vCPU that fills the page with zeros.
func (m *Memory) GuestZero(slot int, page uint64) Write {
	return m.guestWrite(slot, page, true)
}

func (m *Memory) guestWrite(slot int, number uint64, zero bool) Write {
	m.Fetch(slot, number, nil)
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	p := &s.pages[number]
	w := Write{Seq: m.clock.tick(), By: Guest, Zero: zero, Faulted: p.armed}
	if p.armed {
		p.armed = false
		p.dirty = true
		s.faults++
	}
	w.Logged = p.dirty
	s.land(number, w)
	return w
}

// land changes the page's content. It needs mu.
func (s *slot) land(number uint64, w Write) {
	s.pages[number].populated, s.pages[number].given = true, false
	content := s.data[number*mempage.Size : (number+1)*mempage.Size]
	if w.Zero {
		clear(content)
	} else {
		stamp(content, w.Seq)
	}
	s.pages[number].record(w)
}

// words is the number of 64-bit words in a page.
const words = mempage.Size / 8

// stamp writes seq into the first word of a page and into one more.
func stamp(content []byte, seq uint64) {
	binary.LittleEndian.PutUint64(content, seq)
	binary.LittleEndian.PutUint64(content[8*(1+seq%(words-1)):], seq)
}

// Seq is the number of the last write that stamped the page; 0 if the page is zero.
func (m *Memory) Seq(slot int, page uint64) uint64 {
	return binary.LittleEndian.Uint64(m.Bytes(slot, page, 1))
}

// KernelWrite is a write by KVM itself (kvm_write_guest): the bytes land, and the returned
// function puts the page into the log.
func (m *Memory) KernelWrite(slot int, page uint64) (mark func()) {
	s := m.slots[slot]
	m.Fetch(slot, page, nil)
	m.landUnlogged(s, page, Kernel)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.logging {
			s.pages[page].dirty = true
			s.logged(page)
		}
	}
}

// DeviceWrite is a write by the VMM's process: the bytes land, and the returned function
// puts the page into the VMM's log.
func (m *Memory) DeviceWrite(slot int, page uint64) (mark func()) {
	s := m.slots[slot]
	m.Fetch(slot, page, nil)
	m.landUnlogged(s, page, Device)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pages[page].vmm = true
		s.logged(page)
	}
}

func (m *Memory) landUnlogged(s *slot, page uint64, by Writer) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.land(page, Write{Seq: m.clock.tick(), By: by})
}

// logged records that a log has the page's writes. It needs mu.
func (s *slot) logged(page uint64) {
	if h := s.pages[page].history; h != nil {
		for i := range h.last {
			h.last[i].Logged = true
		}
	}
}

// Punch gives pages [first, first+n) back to the host: they become holes, and with mark
// the VMM's log has them, as it should.
func (m *Memory) Punch(slot int, first, n uint64, mark bool) {
	s := m.slots[slot]
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zero(first, n)
	for i := first; i < first+n; i++ {
		if x := m.missing.Load(); x != nil && m.Absent(slot, i) {
			x.came(slot, i) // given up: it comes no more
		}
		p := &s.pages[i]
		p.vmm, p.given = p.vmm || mark, false
		p.record(Write{Seq: m.clock.tick(), By: Punch, Zero: true, Logged: mark})
	}
}

// Loss is a page whose content differs between a source and its destination.
type Loss struct {
	Slot        int
	Page        uint64
	Source      uint64 // number of the last write that stamped it
	Destination uint64
	Writes      []Write // the last ones, at the source
}

func (l Loss) String() string {
	writes := make([]string, len(l.Writes))
	for i, w := range l.Writes {
		writes[i] = w.String()
	}
	return fmt.Sprintf("slot %d page %#x: source has #%d, destination #%d; writes: %s",
		l.Slot, l.Page, l.Source, l.Destination, strings.Join(writes, "; "))
}

// Compare returns the pages whose bytes differ, except those whose content the guest has
// given up, and except what is missing at the destination. Nothing may write either memory meanwhile.
func Compare(source, destination *Memory) []Loss {
	var losses []Loss
	for slot, info := range source.Slots() {
		for page := range info.Pages {
			if string(source.Bytes(slot, page, 1)) != string(destination.Bytes(slot, page, 1)) && !source.Given(slot, page) && !destination.Absent(slot, page) {
				losses = append(losses, Loss{Slot: slot, Page: page, Source: source.Seq(slot, page),
					Destination: destination.Seq(slot, page), Writes: source.History(slot, page)})
			}
		}
	}
	return losses
}
