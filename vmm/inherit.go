package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
)

// Inheritance is how a VM takes the guest of another process of its host over, see
// [Upgrade].
type Inheritance struct {
	// Take waits for what was given under a kind and a number, and decodes what describes the
	// files into meta. The files are the caller's then.
	Take func(ctx context.Context, kind string, n int, meta any) ([]*os.File, error)
	// Lines goes on with the other ends of the guest's lines; Take has got what Upgrade.Lines
	// has told.
	Lines func(ctx context.Context, n int) error
	// Claim takes the right to run the guest, in the moment before it runs; after an error the
	// other process has it.
	Claim func() error
	// Here is called when the guest runs here.
	Here func()
}

// takeTime bounds the wait for something that was given before it was named.
const takeTime = 5 * time.Second

// inheritor is arrivals for a guest of this host.
type inheritor struct {
	arrivals
	from *Inheritance
}

var _ migrate.Sharer = (*inheritor)(nil)

// Build implements [migrate.Builder], for a guest whose memory is sent.
func (b *inheritor) Build(ctx context.Context, config []byte) (migrate.Target, error) {
	return b.build(ctx, config, false)
}

// BuildShared implements [migrate.Sharer].
func (b *inheritor) BuildShared(ctx context.Context, config []byte) (migrate.Target, error) {
	return b.build(ctx, config, true)
}

func (b *inheritor) build(ctx context.Context, config []byte, shared bool) (migrate.Target, error) {
	t, err := b.target(ctx, config, shared)
	if err != nil {
		return nil, openly(err)
	}
	b.vm.setIncoming(t.Machine)
	return &inherited{arrival: arrival{Target: t, vm: b.vm, reader: b.builder.Reader}, from: b.from}, nil
}

// openly marks all words of an error for the other process: it is this host's, and its user
// has started this one.
func openly(err error) error {
	if err == nil {
		return nil
	}
	return kind.Told(errors.New(err.Error()))
}

func (b *inheritor) target(ctx context.Context, config []byte, shared bool) (*machine.Target, error) {
	var c heirConfig
	if err := strictcbor.Unmarshal(config, &c); err != nil {
		return nil, fmt.Errorf("decode the description of the machine: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, takeTime)
	defer cancel()
	var meta heirloomMeta
	files, err := b.from.Take(ctx, GiveHeirloom, c.Heirloom, &meta)
	if err != nil {
		return nil, err
	}
	h, err := meta.heirloom(files)
	if err == nil && shared != (h.Memory != nil) {
		err = fmt.Errorf("memory that is shared: %v, found its descriptor: %v", shared, h.Memory != nil)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return b.builder.BuildHeir(ctx, c.Machine, h)
}

// heirloom sorts the files.
func (m *heirloomMeta) heirloom(files []*os.File) (h machine.Heirloom, err error) {
	take := func(n int) (out []*os.File) {
		if n < 0 || n > len(files) {
			err = fmt.Errorf("descriptors of a machine: %d more are expected, found %d", n, len(files))
			return nil
		}
		out, files = files[:n:n], files[n:]
		return out
	}
	if m.Memory {
		if one := take(1); one != nil {
			h.Memory = one[0]
		}
	}
	for _, n := range m.Devices {
		var d []*os.File
		if n >= 0 {
			d = take(n)
		}
		h.Devices = append(h.Devices, d)
	}
	if err == nil && len(files) > 0 {
		err = fmt.Errorf("descriptors of a machine: %d are too many", len(files))
	}
	for _, f := range files {
		_ = f.Close()
	}
	return h, err
}

// inherited is a guest of another process of this host.
type inherited struct {
	arrival
	from  *Inheritance
	state heirState
}

var (
	_ migrate.Timed          = (*inherited)(nil)
	_ migrate.PreviewChecker = (*inherited)(nil)
)

// PrepareState implements [migrate.Target].
func (t *inherited) PrepareState(state []byte) error {
	t.state = heirState{}
	if err := strictcbor.Unmarshal(state, &t.state); err != nil {
		return openly(fmt.Errorf("decode the machine's state: %w", err))
	}
	return openly(t.arrival.PrepareState(t.state.State))
}

// LoadState implements [migrate.Target].
func (t *inherited) LoadState(ctx context.Context, _ []byte) error {
	err := t.Target.Inherited(mempage.Bitmap(t.state.Populated))
	if err == nil {
		err = t.arrival.LoadState(ctx, t.state.State)
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, takeTime)
		defer cancel()
		err = t.from.Lines(ctx, t.state.Lines)
	}
	return openly(err)
}

// Start implements [migrate.Target].
func (t *inherited) Start(ctx context.Context, paused bool) error {
	return openly(t.arrival.start(func() error {
		if err := t.Target.StartHeir(ctx, paused, t.from.Claim); err != nil {
			return err
		}
		t.from.Here()
		return nil
	}))
}
