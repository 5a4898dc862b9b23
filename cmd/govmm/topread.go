package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/govmm/govmm/vmm/api"
)

// answerTime is how long a VM may take to answer before it counts as one that does not.
const answerTime = 2 * time.Second

// reading is what is known of a VM at one moment.
type reading struct {
	name   string
	client *api.Client
	at     time.Time
	info   api.Info
	use    processUse
	err    error // why there is no more
	gone   bool  // it does not run any more
}

// processUse is what the process of a VM uses. ok: it is known.
type processUse struct {
	ok       bool
	cpu      time.Duration // processor time, of all of its threads
	resident uint64        // bytes, with what the guest has touched of its memory
}

// poller asks VMs what they do. A VM that does not answer is waited for by nobody: it has one
// question at most, in a goroutine of its own.
type poller struct {
	list    func() ([]api.Entry, error)
	answers chan reading
	asked   map[string]context.CancelFunc // by name: questions under way
	listed  map[string]bool               // by the last call of ask
}

// newPoller asks the VMs that list names. answers is read until ctx ends.
func newPoller(list func() ([]api.Entry, error)) *poller {
	return &poller{list: list, answers: make(chan reading, 16), asked: map[string]context.CancelFunc{}}
}

// ask asks every VM that is there and has no question open. It returns the names of those
// that are there no longer.
func (p *poller) ask(ctx context.Context) (gone []string, err error) {
	entries, err := p.list()
	if err != nil {
		return nil, err
	}
	listed := make(map[string]bool, len(entries))
	for _, e := range entries {
		listed[e.Name] = true
		if p.asked[e.Name] != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, answerTime)
		p.asked[e.Name] = cancel
		go func() {
			r := read(ctx, e)
			select {
			case p.answers <- r:
			case <-ctx.Done():
				// Either nobody reads any more, or it has taken all of its time.
				select {
				case p.answers <- r:
				case <-time.After(answerTime):
				}
			}
		}()
	}
	for name := range p.listed {
		if !listed[name] {
			gone = append(gone, name)
		}
	}
	p.listed = listed
	return gone, nil
}

// took notes that an answer was read from answers: its VM can be asked again. It reports
// whether the VM is still there.
func (p *poller) took(r reading) bool {
	if cancel := p.asked[r.name]; cancel != nil {
		cancel()
		delete(p.asked, r.name)
	}
	return p.listed[r.name]
}

// read asks one VM.
func read(ctx context.Context, e api.Entry) reading {
	r := reading{name: e.Name, client: e.Client}
	r.info, r.err = e.Client.Info(ctx)
	r.at = time.Now()
	if r.err == nil {
		r.use = useOf(r.info.PID)
	}
	r.gone = errors.Is(r.err, api.ErrNotRunning) || errors.Is(r.err, api.ErrLost)
	return r
}

// clockTick is the unit of processor time in /proc (USER_HZ), on x86-64 always 100 a second.
const clockTick = time.Second / 100

// useOf reads what a process uses, proc_pid_stat(5).
func useOf(pid int) (u processUse) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return u
	}
	// The second field, the name, is in parentheses and may have any bytes in it.
	f := bytes.Fields(data[bytes.LastIndexByte(data, ')')+1:])
	const state = 3 // the number of the first field behind the name
	number := func(field int) uint64 {
		if field-state >= len(f) {
			return 0
		}
		n, err := strconv.ParseUint(string(f[field-state]), 10, 64)
		if err != nil {
			return 0
		}
		return n
	}
	const utime, stime, rss = 14, 15, 24
	return processUse{ok: len(f) > rss-state, cpu: time.Duration(number(utime)+number(stime)) * clockTick,
		resident: number(rss) * uint64(os.Getpagesize())}
}
