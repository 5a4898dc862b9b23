package vmm

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
)

// TestMigrate: Migrate returns when the guest runs at the destination, or with the
// reason why it does not, and then the guest goes on at the source.
func TestMigrate(t *testing.T) {
	t.Run("completed", func(t *testing.T) {
		vm := obeying(t)
		next := receiving(t, ReceiveConfig{})
		r, err := vm.Migrate(t.Context(), next.Addr().String(), migrate.Options{DowntimeLimit: patience})
		if err != nil || r.Status != "completed" || r.Error != "" || r.BytesSent == 0 {
			t.Fatalf("%+v, %v", r, err)
		}
		next.is(t, StateRunning)
		<-vm.Moved()
		vm.ends(t, Migrated, "the guest runs at "+next.Addr().String())
		_, err = vm.Migrate(t.Context(), next.Addr().String(), migrate.Options{})
		refused(t, err, "moved away")
		next.con.Type("x")
		next.con.Await(t, "x")
	})
	t.Run("dialled by the caller", func(t *testing.T) {
		vm := obeying(t)
		next := receiving(t, ReceiveConfig{})
		r, err := vm.Migrate(t.Context(), "host b", migrate.Options{DowntimeLimit: patience, Dial: func(ctx context.Context, address string) (net.Conn, error) {
			if address != "host b" {
				t.Errorf("dialled %q", address)
			}
			return new(net.Dialer).DialContext(ctx, "tcp", next.Addr().String())
		}})
		if err != nil || r.Status != "completed" {
			t.Fatalf("%+v, %v", r, err)
		}
		vm.ends(t, Migrated, "the guest runs at host b")
	})
	t.Run("cancelled", func(t *testing.T) {
		vm := obeying(t)
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		r, err := vm.Migrate(ctx, stuck(t), migrate.Options{})
		if !errors.Is(err, migrate.ErrCancelled) || r.Status != "cancelled" || r.Error == "" {
			t.Errorf("%+v, %v", r, err)
		}
		vm.goesOn(t)
	})
	t.Run("refused", func(t *testing.T) {
		vm := obeying(t)
		next := receiving(t, ReceiveConfig{Devices: []virtio.Spec{disk("a.img")}})
		r, err := vm.Migrate(t.Context(), next.Addr().String(), migrate.Options{})
		if !errors.Is(err, migrate.ErrRefused) || r.Status != "failed" || !strings.Contains(r.Error, "disk: expected 0 as at the source, 1 given") {
			t.Errorf("%+v, %v", r, err)
		}
		vm.goesOn(t)
	})
	t.Run("nonsense", func(t *testing.T) {
		vm := obeying(t)
		if _, err := vm.Migrate(t.Context(), "nowhere", migrate.Options{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%v", err)
		}
		vm.goesOn(t)
	})
	t.Run("given up too late", func(t *testing.T) {
		vm := obeying(t)
		next := receiving(t, ReceiveConfig{})
		p := newCut(t, next.Addr().String())
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() {
			_, err := vm.Migrate(ctx, p.ln.Addr().String(), migrate.Options{DowntimeLimit: patience})
			ended <- err
		}()
		for deadline := vmtest.Within(t); vm.Info().State != StateHandoffUnknown; time.Sleep(time.Millisecond) {
			check(t, deadline.Err())
		}
		cancel()
		if err := <-ended; !errors.Is(err, migrate.ErrHandoffUnknown) || !errors.Is(err, context.Canceled) {
			t.Errorf("%v", err)
		}
		p.set(false) // the VM goes on asking
		vm.ends(t, Migrated, "")
	})
}

// goesOn expects that the guest runs, and can be moved.
func (r *ran) goesOn(t *testing.T) {
	t.Helper()
	r.is(t, StateRunning)
	r.con.Type("x")
	r.con.Await(t, "Bx")
	next := receiving(t, ReceiveConfig{})
	if res, err := r.Migrate(t.Context(), next.Addr().String(), migrate.Options{DowntimeLimit: patience}); err != nil {
		t.Errorf("%+v, %v", res, err)
	}
}

// TestRelativeDiskMigrates: the destination opens the file that the source has, and
// not another one of the same name in its own directory.
func TestRelativeDiskMigrates(t *testing.T) {
	needKVM(t)
	image := vmtest.Image(t, "a.img", 1<<20)
	t.Chdir(filepath.Dir(image))
	con, cfg := vmtest.NewTape(), testConfig(1, vmtest.Obey)
	cfg.Devices, cfg.Serial, cfg.Log = []virtio.Spec{disk("a.img")}, con, vmtest.Log(t)
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, con)
	r.con.Await(t, "B")
	t.Chdir(filepath.Dir(vmtest.Image(t, "a.img", 1<<20)))
	next := receiving(t, ReceiveConfig{})
	if r := r.migrateTo(t, next.Addr().String()); r.Status != "completed" {
		t.Fatalf("%+v", r)
	}
	if got := next.Info().Devices.Of("disk").(*blk.Info).Path; got != image {
		t.Errorf("the disk at the destination is %s, want %s", got, image)
	}
}

// TestOtherDiskIsNoticed: a destination that reaches another disk of the same size gives
// the guest back, and both sides say why; the source not by the other side's path. A copy of a disk that nobody writes will do.
func TestOtherDiskIsNoticed(t *testing.T) {
	needKVM(t)
	rw, ro := vmtest.Image(t, "rw.img", 1<<20), vmtest.Image(t, "ro.img", 1<<20)
	zeros, changed := vmtest.Image(t, "zeros.img", 1<<20), vmtest.Image(t, "changed.img", 1<<20)
	check(t, os.WriteFile(changed, bytes.Repeat([]byte("changed."), 1<<17), 0o600))
	con, cfg := vmtest.NewTape(), testConfig(1, vmtest.Obey)
	second := disk(ro)
	second.ReadOnly = true
	cfg.Devices, cfg.Serial, cfg.Log = []virtio.Spec{disk(rw), second}, con, vmtest.Log(t)
	vm, err := NewVM(cfg)
	check(t, err)
	r := run(t, vm, con)
	said := "B"
	r.con.Await(t, said)
	for _, c := range []struct{ rw, ro, says string }{
		{changed, ro, "disk " + rw + ": this host has other bytes"},
		{rw, changed, "disk " + ro + ": this host has other bytes"},
		{rw, zeros, ""},
	} {
		next := receiving(t, ReceiveConfig{Devices: []virtio.Spec{disk(c.rw), disk(c.ro)}})
		res, err := r.Migrate(t.Context(), next.Addr().String(), migrate.Options{DowntimeLimit: patience})
		if c.says == "" {
			check(t, err)
			next.con.Type("y")
			next.con.Await(t, "y")
			break
		}
		if err == nil || !strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), changed) {
			t.Errorf("%+v, %v, want %q", res, err, c.says)
		}
		r.is(t, StateRunning)
		said += "x"
		r.con.Type("x")
		r.con.Await(t, said)
	}
}

// TestMigrateBeforeRun: there is no guest to move yet.
func TestMigrateBeforeRun(t *testing.T) {
	needKVM(t)
	vm, err := NewVM(testConfig(1, vmtest.JustCount))
	check(t, err)
	_, err = vm.Migrate(t.Context(), "127.0.0.1:1", migrate.Options{})
	refused(t, err, "does not run yet")
	check(t, vm.Stop(vmtest.Within(t)))
}
