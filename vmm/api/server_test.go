package api_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/internal/kind"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
)

// request speaks HTTP to the VM's socket as curl would.
func request(t *testing.T, c *api.Client, method, path, body string) (status int, header http.Header, answer string) {
	t.Helper()
	client := http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", c.Socket()) },
	}}
	r, err := http.NewRequest(method, "http://vm"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(data)
}

func TestPauseResumeStop(t *testing.T) {
	ctx := context.Background()
	vm := &fakeVM{info: vmm.Info{State: vmm.StateRunning, PID: 42, CPUs: 2, Memory: 512 << 20}}
	c, _ := serve(t, t.TempDir(), "", vm)
	for _, step := range []struct {
		call func() (api.Info, error)
		want vmm.State
	}{
		{func() (api.Info, error) { return c.Pause(ctx) }, vmm.StatePaused},
		{func() (api.Info, error) { return c.Info(ctx) }, vmm.StatePaused},
		{func() (api.Info, error) { return c.Resume(ctx, true) }, vmm.StateRunning},
		{func() (api.Info, error) { return c.Stop(ctx) }, vmm.StateStopped},
	} {
		info, err := step.call()
		if err != nil || info.State != step.want || info.PID != 42 || info.Memory != 512<<20 || info.Socket != c.Socket() {
			t.Errorf("%+v, %v; want state %s", info, err, step.want)
		}
	}
	if !vm.forced {
		t.Error("force got lost")
	}
}

func TestErrorStatus(t *testing.T) {
	vm := &fakeVM{}
	c, _ := serve(t, t.TempDir(), "", vm)
	for _, tc := range []struct {
		err    error
		status int
		kind   error
	}{
		{fmt.Errorf("pause: the guest is paused: %w", vmm.ErrState), 409, vmm.ErrState},
		{fmt.Errorf("%w: no", vmm.ErrInvalid), 400, vmm.ErrInvalid},
		{kind.State("%w: resume it at h:1", vmm.ErrMayRunElsewhere), 409, vmm.ErrState},
		{kind.State("%w: resume it at h:1", vmm.ErrMayRunElsewhere), 409, vmm.ErrMayRunElsewhere},
		{kind.State("%w", vmm.ErrNoBalloon), 409, vmm.ErrNoBalloon},
		{errors.Join(errors.New("KVM_RUN vcpu 0"), errors.New("bad address")), 500, nil},
	} {
		vm.mu.Lock()
		vm.err = tc.err
		vm.mu.Unlock()
		status, header, body := request(t, c, "POST", "/v1/pause", "")
		var e struct {
			Title, Detail, Type string
			Status              int
		}
		if err := json.Unmarshal([]byte(body), &e); err != nil || status != tc.status || e.Detail == "" || e.Status != status || e.Title != http.StatusText(status) || e.Type == "" ||
			strings.Contains(e.Detail, "\n") || header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%v: %d %s, want %d and one line", tc.err, status, body, tc.status)
		}
		_, err := c.Pause(context.Background())
		if err == nil || err.Error() != e.Detail || (tc.kind != nil && !errors.Is(err, tc.kind)) ||
			errors.Is(err, vmm.ErrNoBalloon) != errors.Is(tc.err, vmm.ErrNoBalloon) {
			t.Errorf("the client says %v, want %q", err, e.Detail)
		}
	}
}

func TestStrictRequests(t *testing.T) {
	c, _ := serve(t, t.TempDir(), "", &fakeVM{})
	for _, tc := range []struct {
		method, path, body string
		status             int
	}{
		{"GET", "/v1/info", "", 200},
		{"GET", "/v1/nothing", "", 404},
		{"GET", "/", "", 404},
		{"POST", "/v1/info", "", 405},
		{"GET", "/v1/pause", "", 405},
		{"PUT", "/v1/migration", "", 405},
		{"GET", "/v1/migration", "", 404},
		{"DELETE", "/v1/migration", "", 404},
		{"GET", "/v1/migration/events", "", 404},
		{"POST", "/v1/pause", "{}", 200},
		{"POST", "/v1/pause", " {}\n", 200},
		{"POST", "/v1/pause", `{"x":1}`, 400},
		{"POST", "/v1/pause", "null", 400},
		{"POST", "/v1/pause", "[]", 400},
		{"POST", "/v1/resume", `{"force":true}`, 200},
		{"POST", "/v1/resume", `{"force":1}`, 400},
		{"POST", "/v1/resume", `{"force":true}{}`, 400},
		{"POST", "/v1/resume", `{"force":true`, 400},
		{"POST", "/v1/resume", `{"force":true,"a":"` + strings.Repeat("x", 300<<10) + `"}`, 400},
		{"PUT", "/v1/balloon", `{}`, 400},
		{"PUT", "/v1/balloon", `{"target":null}`, 400},
		{"PUT", "/v1/balloon", `{"target":-1}`, 400},
		{"PUT", "/v1/balloon", `{"target":4096}`, 200},
		{"GET", "/v1/info?x=1", "", 400},
		{"GET", "//v1/info", "", 404},
		{"GET", "/v1/openapi.json", "", 200},
		{"GET", "/v1/openapi-3.0.json", "", 200},
		{"POST", "/v1/migration", `{"to":null}`, 400},
		{"POST", "/v1/migration", ``, 400},
		{"POST", "/v1/migration", `{}`, 400},
		{"POST", "/v1/migration", `{"to":"host"}`, 400},
		{"POST", "/v1/migration", `{"to":"host:0"}`, 400},
		{"POST", "/v1/migration", `{"to":"host:http"}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","downtime_limit":300}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","downtime_limit":"0s"}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","downtime_limit":"-1s"}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","timeout":"soon"}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","bandwidth_limit":-1}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","bandwidth_limit":1}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","bandwidth_limit":1e30}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","max_rounds":-1}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","clear_bitmap_shift":5}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","clear_bitmap_shift":32}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","channels":17}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","channels":-1}`, 400},
		{"POST", "/v1/migration", `{"to":"h:1","compress":"gzip"}`, 400},
		{"POST", "/v1/migration?follow=maybe", `{"to":"h:1"}`, 400},
	} {
		status, header, body := request(t, c, tc.method, tc.path, tc.body)
		if status != tc.status {
			t.Errorf("%s %s %.60s: %d %s, want %d", tc.method, tc.path, tc.body, status, body, tc.status)
		}
		if status == 405 && header.Get("Allow") == "" {
			t.Errorf("%s %s: no Allow", tc.method, tc.path)
		}
		var v map[string]any
		if err := json.Unmarshal([]byte(body), &v); err != nil || (status >= 400) != (v["detail"] != nil) || (status >= 400) != (header.Get("Content-Type") == "application/problem+json") {
			t.Errorf("%s %s %.60s: %q", tc.method, tc.path, tc.body, body)
		}
	}
}

func TestMigrateOptionsArrive(t *testing.T) {
	vm := &fakeVM{migration: newFakeMigration()}
	vm.migration.end(migrate.Result{Status: "completed"})
	c, _ := serve(t, t.TempDir(), "", vm)
	res, err := c.Migrate(context.Background(), api.MigrateRequest{
		To: "[::1]:7000", DowntimeLimit: api.Duration(50 * time.Millisecond), BandwidthLimit: 100 << 20,
		Timeout: api.Duration(time.Minute), MaxRounds: 9, ClearBitmapShift: 6, VerifyPages: true, AutoConverge: true,
		Channels: 4, Compress: "zstd",
	}, nil)
	if err != nil || res.Status != "completed" {
		t.Fatalf("%+v, %v", res, err)
	}
	want := migrate.DefaultOptions()
	want.DowntimeLimit, want.BandwidthLimit, want.Timeout = 50*time.Millisecond, 100<<20, time.Minute
	want.MaxRounds, want.ClearBitmapShift, want.VerifyPages, want.AutoConverge = 9, 6, true, true
	want.Channels, want.Compression = 4, migrate.CompressZstd
	if !reflect.DeepEqual(vm.opt, want) || vm.addr != "[::1]:7000" {
		t.Errorf("%q %+v, want %+v", vm.addr, vm.opt, want)
	}
	if _, err := c.Migrate(context.Background(), api.MigrateRequest{To: "h:1"}, nil); err != nil || !reflect.DeepEqual(vm.opt, migrate.DefaultOptions()) {
		t.Errorf("%+v, %v; want the defaults", vm.opt, err)
	}
}

// The answer that does without the routes is the one that they give.
func TestInfoByBothWays(t *testing.T) {
	c, _ := serve(t, t.TempDir(), "", &fakeVM{info: vmm.Info{State: vmm.StateRunning, Kernel: "<ELF>"}})
	for range 2 {
		status, header, short := request(t, c, "GET", "/v1/info", "")
		status2, header2, long := request(t, c, "GET", "/v1/info", "{}")
		if status != 200 || status2 != 200 || short != long || header.Get("Content-Type") != header2.Get("Content-Type") {
			t.Errorf("%d %v %s\n%d %v %s", status, header, short, status2, header2, long)
		}
	}
}
