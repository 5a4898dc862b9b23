package vmm

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/vmtest"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm/cpu"
)

// TestBaselinesRun: a guest of each model runs on this host's KVM and moves, and has
// the same processor at the destination.
func TestBaselinesRun(t *testing.T) {
	needKVM(t)
	for _, model := range cpu.Models() {
		t.Run(model, func(t *testing.T) {
			con := vmtest.NewTape()
			cfg := testConfig(2, vmtest.Obey)
			cfg.CPU, cfg.Serial, cfg.Log = model, con, vmtest.Log(t)
			vm, err := NewVM(cfg)
			if err != nil && strings.Contains(err.Error(), "CPU "+model+": this host lacks ") {
				t.Log(err) // expected on a host without these features
				return
			}
			check(t, err)
			set := vm.machine.Spec().CPUID
			r := run(t, vm, con)
			con.Await(t, "B")
			next := receiving(t, ReceiveConfig{})
			// The test is not about time: the machine may be slow.
			mig, err := r.StartMigration(next.Addr().String(), migrate.Options{VerifyPages: true, DowntimeLimit: 30 * time.Second})
			check(t, err)
			if res := result(t, mig); res.Status != "completed" {
				t.Fatalf("%+v", res)
			}
			r.ends(t, Migrated, "")
			if !reflect.DeepEqual(next.current().Spec().CPUID, set) {
				t.Error("another processor at the destination")
			}
			next.con.Type("x")
			next.con.Await(t, "x")
		})
	}
}
