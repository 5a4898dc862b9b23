package vmm

import (
	"errors"
	"log/slog"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/vmm/serial"
)

// fickle is the other end of a line that takes output, or does not.
type fickle struct {
	serial.Backend
	fails error
	takes int // bytes, before it fails
}

func (f *fickle) Write(p []byte) (int, error) {
	if f.fails != nil {
		return min(f.takes, len(p)), f.fails
	}
	return len(p), nil
}

// TestLostOutputIsTold: one line when output begins to be lost, one when it ends, at most
// every ten seconds, and no error of the VM.
func TestLostOutputIsTold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		back := &fickle{}
		l := &line{Backend: back, name: "serial port", log: slog.New(slog.NewTextHandler(&log, nil))}
		write := func(fails error, takes int) {
			t.Helper()
			back.fails, back.takes = fails, takes
			if n, err := l.Write(make([]byte, 100)); n != 100 || err != nil {
				t.Fatalf("%d, %v", n, err)
			}
		}
		says := func(lines int, last string) {
			t.Helper()
			all := strings.Split(strings.TrimSuffix(log.String(), "\n"), "\n")
			if log.String() == "" {
				all = nil
			}
			if len(all) != lines || lines > 0 && !strings.Contains(all[lines-1], last) {
				t.Fatalf("the log is %q, want %d lines, the last with %q", log.String(), lines, last)
			}
		}
		write(nil, 0)
		says(0, "")
		for range 5 {
			write(unix.ENOSPC, 30)
		}
		says(1, "msg=\"output of the guest is lost from here on\" device=\"serial port\" err=\"no space left on device\"")
		write(nil, 0)
		write(nil, 0)
		says(2, "msg=\"output of the guest is taken again\" device=\"serial port\" lost_bytes=350")
		for range 20 { // now and then a byte
			write(unix.ENOSPC, 0)
			write(nil, 0)
		}
		says(2, "")
		time.Sleep(lossEvery)
		write(unix.ENOSPC, 0)
		says(3, "lost from here on")
		write(nil, 0)
		says(4, "lost_bytes=2100")
		write(os.ErrClosed, 0)
		says(4, "")
	})
}

// TestExitIsTheGuests: output that nobody takes is no error of a VM that has ended well.
func TestExitIsTheGuests(t *testing.T) {
	needKVM(t)
	tape := vmtest.NewTape()
	cfg := testConfig(1, vmtest.Obey)
	cfg.Serial, cfg.Log = &fickle{Backend: tape, fails: unix.ENOSPC}, vmtest.Log(t)
	vm, err := NewVM(cfg)
	check(t, err)
	tape.Type("p")
	out, err := vm.Run(vmtest.Within(t))
	if err != nil || out.Kind != PoweredOff || errors.Is(err, unix.ENOSPC) {
		t.Errorf("%+v, %v", out, err)
	}
}
