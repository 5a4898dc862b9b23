package api_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

func TestBalloon(t *testing.T) {
	free := uint64(5 << 20)
	vm := &fakeVM{}
	vm.balloon.Actual = 4096
	c, _ := serve(t, t.TempDir(), "db", vm)
	b, err := c.SetBalloon(t.Context(), 64<<20)
	if err != nil || b.Target != 64<<20 || b.Actual != 4096 || b.Stats != nil {
		t.Errorf("%+v, %v", b, err)
	}
	if b, err = c.SetBalloon(t.Context(), 0); err != nil || b.Target != 0 {
		t.Errorf("0 is a target: %+v, %v", b, err)
	}
	vm.mu.Lock()
	vm.balloon.Stats = &balloon.Stats{At: time.Unix(5, 0), Free: &free}
	vm.mu.Unlock()
	if b, err = c.Balloon(t.Context()); err != nil || b.Stats == nil || *b.Stats.Free != free || b.Stats.Total != nil {
		t.Errorf("%+v, %v", b, err)
	}
	for _, kind := range []error{vmm.ErrState, vmm.ErrInvalid} {
		vm.mu.Lock()
		vm.err = kind
		vm.mu.Unlock()
		if _, err := c.SetBalloon(t.Context(), 1); !errors.Is(err, kind) {
			t.Errorf("%v is told as %v", kind, err)
		}
	}
}

// A press answers when the machine has ended or the time is up, whichever is
// first.
func TestPowerButton(t *testing.T) {
	vm := &fakeVM{ended: make(chan struct{})}
	vm.info.State = vmm.StateRunning
	c, _ := serve(t, t.TempDir(), "db", vm)
	if info, err := c.PowerOff(t.Context(), 0); err != nil || info.State != vmm.StateRunning {
		t.Errorf("without waiting: %+v, %v", info, err)
	}
	if info, err := c.PowerOff(t.Context(), time.Millisecond); err != nil || info.State != vmm.StateRunning {
		t.Errorf("a guest that does not power off: %+v, %v", info, err)
	}
	answer := make(chan api.Info, 1)
	go func() {
		info, err := c.PowerOff(t.Context(), time.Hour)
		if err != nil {
			t.Error(err)
		}
		answer <- info
	}()
	for pressed := 0; pressed < 3; time.Sleep(time.Millisecond) {
		vm.mu.Lock()
		pressed = vm.pressed
		vm.mu.Unlock()
	}
	select {
	case info := <-answer:
		t.Errorf("answered before the end: %+v", info)
	default:
	}
	vm.end(vmm.StateStopped)
	if info := <-answer; info.State != vmm.StateStopped {
		t.Errorf("%+v", info)
	}
	vm.mu.Lock()
	vm.err = vmm.ErrState
	vm.mu.Unlock()
	if _, err := c.PowerOff(t.Context(), time.Hour); !errors.Is(err, vmm.ErrState) {
		t.Errorf("a guest that does not listen: %v", err)
	}
}

// Bodies that make no sense reach no machine.
func TestDeviceRequestsRefused(t *testing.T) {
	vm := &fakeVM{}
	c, _ := serve(t, t.TempDir(), "db", vm)
	for _, tc := range []struct{ method, path, body, says string }{
		{"PUT", "/v1/balloon", `{}`, "target"},
		{"PUT", "/v1/balloon", `{"target":-1}`, "target"},
		{"PUT", "/v1/balloon", `{"target":"64M"}`, "target"},
		{"PUT", "/v1/balloon", `{"size":1}`, "size"},
		{"POST", "/v1/power-button", `{"wait":"-1s"}`, "duration"},
		{"POST", "/v1/power-button", `{"wait":"25h"}`, "24h"},
	} {
		status, _, answer := request(t, c, tc.method, tc.path, tc.body)
		if status != 400 || !strings.Contains(answer, tc.says) {
			t.Errorf("%s %s %s: %d %s", tc.method, tc.path, tc.body, status, answer)
		}
	}
	if vm.pressed != 0 || vm.balloon.Target != 0 {
		t.Error("the machine was asked")
	}
}
