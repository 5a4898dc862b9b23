package vmm

import (
	"context"
	"fmt"
	"net"
	"os"

	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/migrate"
)

// An upgrade is a migration to another process of this host, which is given what both can
// use: descriptors of memory, disks and taps go to it besides, by [Upgrade.Give] here and
// [Inheritance.Take] there. Memory that is a file is shared (migrate.Options.SharedMemory);
// other memory is sent, as to any destination.

// Upgrade is how a VM reaches the process that is to go on with its guest.
type Upgrade struct {
	// Dial makes a connection to its receiver.
	Dial func(ctx context.Context) (net.Conn, error)
	// Referee decides who has the guest if the other process does not answer any more.
	Referee migrate.Referee
	// Give passes descriptors on, under a kind and a number, which begins with 1 and rises. The
	// files stay the caller's.
	Give func(ctx context.Context, kind string, n int, meta any, files []*os.File) error
	// Hold is called before the guest stops, and Continue when it goes on here after all. In
	// between nothing may be taken from what the other process takes over.
	Hold, Continue func()
	// Lines describes the other ends of the guest's lines when the guest stands still, and
	// what was printed has been written: what the other process needs to go on with them.
	Lines func() (meta any, files []*os.File, err error)
	// Left is called when the guest runs in the other process, before anything is freed here.
	Left func()
}

// Kinds of [Upgrade.Give].
const (
	GiveHeirloom = "heirloom" // before the machine is described
	GiveLines    = "lines"    // before its state is sent
)

// heirloomMeta says which descriptors are which: first the memory's, if there is one, then
// so many of each device; -1: it is opened anew.
type heirloomMeta struct {
	Memory  bool  `json:"memory"`
	Devices []int `json:"devices"`
}

// heirConfig is the machine's description with the number of the heirloom that belongs to
// it.
type heirConfig struct {
	Heirloom int    `cbor:"heirloom"`
	Machine  []byte `cbor:"machine"`
}

// heirState is the machine's state with what belongs to it beside.
type heirState struct {
	State     []byte   `cbor:"state"`
	Populated []uint64 `cbor:"populated"` // huge pages; nil: the memory is not of these
	Lines     int      `cbor:"lines"`     // the number of what was given of the lines
}

// SharesMemory reports whether the memory of the guest here can be shared by an upgrade. It
// is sent otherwise, and there must be room for it twice.
func (v *VM) SharesMemory() bool {
	m := v.current()
	return m != nil && m.SharesMemory()
}

// StartUpgrade lets the guest go on in another process of this host: the migration that it
// returns tells how it goes. It is refused where [VM.StartMigration] would be.
func (v *VM) StartUpgrade(u Upgrade, opt migrate.Options) (*migrate.Migration, error) {
	opt.Dial = func(ctx context.Context, _ string) (net.Conn, error) { return u.Dial(ctx) }
	opt.Referee = u.Referee
	if opt.Trigger == "" {
		opt.Trigger = "upgrade"
	}
	o, err := v.beginMigration(NewProcess, opt, &u)
	if err != nil {
		return nil, err
	}
	return o.Migration, nil
}

// NewProcess is the address of an upgrade, where a migration has that of a host.
const NewProcess = "the new process"

// heir is the guest as an upgrade sends it.
type heir struct {
	*migrant
	u *Upgrade

	heirlooms, lines int // how many were given
}

var (
	_ migrate.Resetter  = (*heir)(nil)
	_ migrate.Hinting   = (*heir)(nil)
	_ migrate.Throttler = (*heir)(nil)
	_ migrate.BulkLog   = (*heir)(nil)
	_ migrate.Previewer = (*heir)(nil)
)

// MigrationConfig gives the other process what the machine leaves, and describes it.
func (g *heir) MigrationConfig() ([]byte, error) {
	h, err := g.machine.Heirloom()
	if err != nil {
		return nil, err
	}
	defer h.Close()
	var meta heirloomMeta
	var files []*os.File
	if meta.Memory = h.Memory != nil; meta.Memory {
		files = append(files, h.Memory)
	}
	for _, d := range h.Devices {
		n := -1
		if d != nil {
			n = len(d)
		}
		meta.Devices, files = append(meta.Devices, n), append(files, d...)
	}
	g.heirlooms++
	if err := g.u.Give(context.Background(), GiveHeirloom, g.heirlooms, meta, files); err != nil {
		return nil, fmt.Errorf("pass on what the machine has open: %w", err)
	}
	spec, err := g.migrant.MigrationConfig()
	if err != nil {
		return nil, err
	}
	return strictcbor.Marshal(heirConfig{g.heirlooms, spec})
}

// PrepareStop does nothing: what this process has written, the other one sees.
func (g *heir) PrepareStop(context.Context) error { return nil }

// PauseForHandoff implements [migrate.Source].
func (g *heir) PauseForHandoff(ctx context.Context) (wasRunning bool, err error) {
	g.u.Hold()
	return g.migrant.PauseForHandoff(ctx)
}

// SaveState implements [migrate.Source].
func (g *heir) SaveState(ctx context.Context) ([]byte, error) {
	state, err := g.migrant.SaveState(ctx)
	if err != nil {
		return nil, err
	}
	g.lines++
	s := heirState{State: state, Lines: g.lines}
	if s.Populated, err = g.machine.Populations(); err != nil {
		return nil, err
	}
	meta, files, err := g.u.Lines()
	if err != nil {
		return nil, err
	}
	err = g.u.Give(ctx, GiveLines, g.lines, meta, files)
	for _, f := range files {
		_ = f.Close()
	}
	if err != nil {
		return nil, fmt.Errorf("pass on the guest's lines: %w", err)
	}
	return strictcbor.Marshal(s)
}

// YieldForHandoff gives up what does not go along by descriptors.
func (g *heir) YieldForHandoff(ctx context.Context) error {
	return g.Source.YieldToHeir(ctx)
}

// ResumeAfterAbort implements [migrate.Source].
func (g *heir) ResumeAfterAbort(ctx context.Context) error {
	err := g.migrant.ResumeAfterAbort(ctx)
	g.u.Continue()
	return err
}

// sends makes the source of a migration of the guest.
func (u *Upgrade) sends(g *migrant) migrate.Source {
	if u == nil {
		return g
	}
	return &heir{migrant: g, u: u}
}
