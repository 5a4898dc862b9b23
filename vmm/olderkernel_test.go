package vmm

import (
	"fmt"
	"strings"
	"testing"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/kvm"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/machine"
)

// TestOlderKernels migrates a guest that rewrites memory as fast as it can, as on
// kernels without KVM_DIRTY_LOG_INITIALLY_SET (before 5.7), and as on kernels without
// manual protection (before 5.0), which have KVM_GET_DIRTY_LOG only.
func TestOlderKernels(t *testing.T) {
	needKVM(t)
	defer testhook.WithoutDirtyLog.Store(0)
	for _, flags := range []int{kvm.DirtyLogManualProtect, 0} {
		t.Run(fmt.Sprintf("flags %d", flags), func(t *testing.T) {
			const all = kvm.DirtyLogManualProtect | kvm.DirtyLogInitiallySet
			testhook.WithoutDirtyLog.Store(int64(all &^ flags))
			con := vmtest.NewTape()
			vm, err := NewVM(Config{Name: "old", CPUs: 2, Memory: 64 << 20, Serial: con, Log: vmtest.Log(t), Tracking: machine.TrackBitmap,
				Cmdline: "fill=32M dirty=16M rate=0 verify=0.5 tick=0.5"})
			check(t, err)
			here := run(t, vm, con)
			con.AwaitPart(t, "tick 2 ")
			if here.current().ManualProtect() != (flags != 0) {
				t.Fatal("the machine uses other flags")
			}
			there := receiving(t, ReceiveConfig{})
			m, err := here.StartMigration(there.Addr().String(), migrate.Options{VerifyPages: true, ClearBitmapShift: 8})
			check(t, err)
			if r := result(t, m); r.Status != "completed" {
				t.Fatalf("%+v", r)
			}
			there.con.AwaitThat(t, "four ticks", func(out string) bool { return strings.Count(out, " bad=") >= 4 })
			if text := there.con.Text(); strings.Contains(text, "bad page") || !strings.Contains(text, " bad=0 ") {
				t.Error(text)
			}
			check(t, there.Stop(vmtest.Within(t)))
		})
	}
}
