package snapshot

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	"github.com/govmm/govmm/migrate"
)

// Options say how a snapshot is kept. The zero value keeps no disks, and memory as it is.
type Options struct {
	User     int         // of the VM's process, if it is another one's; 0: as this one's
	Disks    Disks       // "": DisksNone
	Compress Compression // "": CompressNone
	Version  string      // of the program, for people
}

func (o Options) withDefaults() Options {
	if o.Disks == "" {
		o.Disks = DisksNone
	}
	if o.Compress == "" {
		o.Compress = CompressNone
	}
	return o
}

// Keeper receives one snapshot.
type Keeper struct {
	receiver *migrate.Receiver
	builder  *keeper
	ln       net.Listener
	cancel   context.CancelFunc
	served   chan error
}

// Keep begins to receive a snapshot at ln, from a migration with [migrate.Options].Snapshot,
// and to keep it in the directory dir, which must not exist. Nothing is written before the
// migration begins.
func Keep(dir string, ln net.Listener, opt Options) (*Keeper, error) {
	dir, err := CheckNew(dir)
	if err != nil {
		return nil, err
	}
	builder := &keeper{dir: dir, opt: opt.withDefaults()}
	k := &Keeper{receiver: migrate.NewKeeper(builder), builder: builder, ln: ln, served: make(chan error, 1)}
	k.receiver.TrustUser(opt.User)
	ctx, cancel := context.WithCancel(context.Background())
	k.cancel = cancel
	go func() { k.served <- k.receiver.Serve(ctx, ln) }()
	return k, nil
}

// CheckNew reports why no snapshot can be made at dir, and returns its absolute path.
func CheckNew(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", err
	}
	if _, err := os.Lstat(dir); !errors.Is(err, os.ErrNotExist) {
		if err == nil {
			err = os.ErrExist
		}
		return "", fmt.Errorf("%s: %w: a snapshot is made in a directory of its own, which must not exist before", dir, err)
	}
	st, err := os.Stat(filepath.Dir(dir))
	if err == nil && !st.IsDir() {
		err = errors.New("not a directory")
	}
	if err != nil {
		return "", fmt.Errorf("the directory of %s: %w", dir, err)
	}
	return dir, nil
}

// Settle waits until nothing is being received or kept, or ctx ends. It is for a snapshot
// whose guest's process has died: all of it may have been received before.
func (k *Keeper) Settle(ctx context.Context) {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for k.receiver.Progress().Active {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

// Work is what a snapshot takes beside receiving memory: disks are copied, memory is made
// durable and its sum is made.
type Work struct {
	What      string // "copying disks" or "writing memory"
	Done, All uint64 // bytes
}

// Work returns what is being done; its zero value: nothing.
func (k *Keeper) Work() Work {
	if w := k.builder.work.Load(); w != nil {
		return Work{w.what, w.done.Load(), w.all}
	}
	return Work{}
}

// Close ends the receiving, and returns the manifest of the snapshot if one was kept. What
// was begun and not kept is removed; and so is what was kept if the migration has failed
// all the same: its source goes on as if there were none.
func (k *Keeper) Close(failed error) (*Manifest, error) {
	k.cancel()
	<-k.served
	select {
	case t := <-k.receiver.Arrived():
		d := t.(*draft)
		if failed != nil {
			return nil, errors.Join(failed, d.remove())
		}
		return &d.manifest, nil
	default:
		if failed == nil {
			failed = errors.New("no snapshot was kept")
		}
		return nil, failed
	}
}
