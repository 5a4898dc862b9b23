package vmm

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/memory"
)

// untouched finds a page of which the host knows nothing yet, nor of its neighbours.
func untouched(t *testing.T, m *memory.Memory) (page []byte, gpa uint64) {
	t.Helper()
	const block = 512 // a huge page
	var populated [block / mempage.WordBits]uint64
	slot := m.Slots()[0]
	for first := slot.Size/mempage.Size - block; first > 0; first -= block {
		check(t, m.Populated(0, first, block, populated[:]))
		if populated == [block / mempage.WordBits]uint64{} {
			return m.SlotBytes(0, first, 1), slot.GPA + first*mempage.Size
		}
	}
	t.Fatal("all of the memory is in use")
	return nil, 0
}

// TestPageThatTheHostHasLost: a page of guest memory that the host cannot access is
// named by a migration, which ends; the guest goes on, and so does the process.
func TestPageThatTheHostHasLost(t *testing.T) {
	needKVM(t)
	con := vmtest.NewTape()
	vm, err := NewVM(Config{Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Cmdline: "fill=8M dirty=1M rate=0 verify=1 tick=0.2"})
	check(t, err)
	r := run(t, vm, con)
	con.AwaitPart(t, "tick")
	page, gpa := untouched(t, vm.machine.Memory())
	vmtest.Poison(t, page)
	says := fmt.Sprintf("guest memory at gpa %#x: the host cannot access the page", gpa)
	for _, opt := range []migrate.Options{{}, {Compression: migrate.CompressLZ4}, {VerifyPages: true, Channels: 3}} {
		next := receiving(t, ReceiveConfig{})
		res, err := vm.Migrate(vmtest.Within(t), next.Addr().String(), opt)
		if failed := (*migrate.PageError)(nil); !errors.As(err, &failed) || failed.GPA != gpa || !strings.Contains(res.Error, says) {
			t.Errorf("%+v: %v, want %q", opt, err, says)
		}
		r.is(t, StateRunning)
	}
	before := strings.Count(con.Text(), "tick")
	con.AwaitThat(t, "the guest goes on", func(text string) bool { return strings.Count(text, "tick") > before+1 })
	if err := vm.machine.Memory().ReadAt(make([]byte, 8), gpa); err == nil {
		t.Error("the page can be read")
	}
}

// TestGuestTouchesAPageThatIsLost: the VM ends as one that crashed, with the page's
// name; the process goes on.
func TestGuestTouchesAPageThatIsLost(t *testing.T) {
	needKVM(t)
	con := vmtest.NewTape()
	vm, err := NewVM(Config{Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Cmdline: "fill=32M"})
	check(t, err)
	const from, to, step = 10 << 20, 60 << 20, 2 << 20 // the guest fills some of it
	for gpa := uint64(from); gpa < to; gpa += step {
		vmtest.Poison(t, vm.machine.Memory().SlotBytes(0, gpa/mempage.Size, 1))
	}
	r := run(t, vm, con)
	r.ends(t, Crashed, "the host cannot access the page")
	out := <-r.out
	var gpa uint64
	if _, err := fmt.Sscanf(out.Text, "vCPU 0: guest memory at gpa 0x%x: ", &gpa); err != nil || gpa < from || gpa >= to || gpa%step != 0 {
		t.Errorf("told %q", out.Text)
	}
}
