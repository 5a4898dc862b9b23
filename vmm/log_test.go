package vmm

import (
	"strings"
	"testing"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/virtio"
)

// mistaken makes the same mistake with the first device 20,000 times, and goes on as vmtest.Obey.
var mistaken = append([]byte{
	0xb9, 0x20, 0x4e, 0x00, 0x00, // mov $20000,%ecx
	0x8b, 0x1d, 0x10, 0x80, 0x00, 0xe0, // mov 0xe0008010,%ebx: BAR 0 in slot 1
	0x80, 0xe3, 0xf0, // and $0xf0,%bl
	0xc6, 0x43, 0x14, 0x04, // 0e: movb $4,0x14(%ebx): DRIVER_OK without FEATURES_OK
	0xc6, 0x43, 0x14, 0x00, // movb $0,0x14(%ebx)
	0x49,       // dec %ecx
	0x75, 0xf5, // jne 0e
}, vmtest.Obey...)

// TestAGuestCannotFillTheLog: 20,000 mistakes of a guest are two records, and it does not wait
// for a handler that takes none.
func TestAGuestCannotFillTheLog(t *testing.T) {
	lines := make(chan string)
	cfg := testConfig(1, mistaken)
	cfg.Devices, cfg.Log = []virtio.Spec{&balloon.Spec{}}, vmtest.LogTo(lines)
	vm := running(t, cfg, "B")
	if line := <-lines; !strings.Contains(line, `msg="the device needs a reset" device=balloon`) {
		t.Error(line)
	}
	// More comes at the end of ten seconds, or of the VM.
	go func() { _ = vm.Stop(t.Context()) }()
	sum := 0
	for sum < 19999 {
		line := <-lines
		_, count, _ := strings.Cut(line, "more=")
		n := 0
		for _, digit := range count {
			n = 10*n + int(digit-'0')
		}
		if sum += n; n == 0 {
			t.Fatal(line)
		}
	}
	vm.ends(t, Stopped, "")
}
