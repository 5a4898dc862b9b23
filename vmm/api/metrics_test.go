package api_test

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/latency"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
)

// measured is a VM with one of everything that is measured.
func measured() *fakeVM {
	var took latency.Counter
	took.Observe(time.Millisecond)
	took.Observe(time.Minute)
	return &fakeVM{
		info: vmm.Info{Name: "db", State: vmm.StateMigrating, Memory: 512 << 20, Devices: vmm.Devices{
			{Kind: balloon.Kind, Name: "balloon", Info: &balloon.Info{Target: 8, Actual: 4}},
			{Kind: blk.Kind, Name: "disk a\xff\"\n", Info: &blk.Info{Stats: blk.Stats{Reads: 3, ReadBytes: 4096, Errors: 1, Latency: took.Snapshot()}}},
			{Kind: blk.Kind, Name: "disk b", Info: &blk.Info{}},
			{Kind: net.Kind, Name: "net tap0", Info: &net.Info{RxFrames: 5, TxDropped: 2}},
		}},
		stats: vmm.Stats{CPUTime: time.Second, Resident: 1 << 20, VCPUs: []machine.VCPUStats{{Time: 1500 * time.Millisecond, Exits: map[string]uint64{"io": 7, "signal": 1}}, {}}},
		records: []vmm.MigrationRecord{
			{ID: "1", Result: &migrate.Result{Status: "failed", Reason: "refused"}},
			{ID: "2", Result: &migrate.Result{Status: "completed", Downtime: 4 * time.Millisecond}},
			{ID: "3", Progress: &migrate.Progress{Phase: migrate.PhasePrecopy, Round: 3, BytesSent: 99, ThrottlePercent: 20, Postcopy: &migrate.Postcopy{Faults: 6}}},
		},
	}
}

func TestMetrics(t *testing.T) {
	c, _ := serve(t, t.TempDir(), "db", measured())
	status, header, text := request(t, c, "GET", "/metrics", "")
	if status != 200 || !strings.HasPrefix(header.Get("Content-Type"), "text/plain") {
		t.Fatalf("%d %v %s", status, header, text)
	}
	for _, line := range []string{
		`govmm_vm_state{name="db",state="migrating"} 1`, `govmm_vm_state{name="db",state="running"} 0`, `govmm_memory_bytes 5.36870912e+08`,
		`govmm_process_cpu_seconds_total 1`, `govmm_process_resident_memory_bytes 1.048576e+06`, `govmm_vcpu_seconds_total{vcpu="0"} 1.5`,
		`govmm_vcpu_exits_total{kind="io",vcpu="0"} 7`, `govmm_balloon_bytes 4`, `govmm_balloon_target_bytes 8`,
		`govmm_disk_requests_total{disk="disk a?\"\n",operation="read"} 3`, `govmm_disk_errors_total{disk="disk a?\"\n"} 1`,
		`govmm_disk_request_duration_seconds_bucket{disk="disk a?\"\n",le="0.001"} 1`, `govmm_disk_request_duration_seconds_bucket{disk="disk a?\"\n",le="+Inf"} 2`,
		`govmm_network_frames_total{device="net tap0",direction="receive"} 5`, `govmm_network_dropped_total{device="net tap0",direction="transmit"} 2`,
		`govmm_migrations{reason="refused",status="failed"} 1`, `govmm_migration_downtime_seconds_bucket{le="0.005"} 1`, `govmm_migration_downtime_seconds_count 1`,
		`govmm_migration_phase{phase="precopy"} 1`, `govmm_migration_rounds 3`, `govmm_migration_sent_bytes 99`, `govmm_migration_throttle_ratio 0.2`,
		`govmm_migration_postcopy_faults 6`,
	} {
		if !strings.Contains(text, "\n"+strings.ReplaceAll(line, "\n", `\n`)+"\n") {
			t.Errorf("no line %s", line)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) != 0 {
		t.Errorf("%v, %+v", err, problems)
	}
	checkWithPromtool(t, text)

	// A VM that has nothing of all that.
	c, _ = serve(t, t.TempDir(), "", &fakeVM{})
	if status, _, text := request(t, c, "GET", "/metrics", ""); status != 200 || strings.Contains(text, "govmm_disk") || !strings.Contains(text, "govmm_vm_state") {
		t.Errorf("%d %s", status, text)
	}
}

// checkWithPromtool has Prometheus' own tool check a reading, if it is installed (test/setup.sh).
func checkWithPromtool(t *testing.T, text string) {
	t.Helper()
	tool, err := exec.LookPath("promtool")
	if err != nil {
		t.Log("promtool is not installed (make setup); its rules were checked, it was not run")
		return
	}
	cmd := exec.Command(tool, "check", "metrics")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// A listener for metrics serves nothing else.
func TestMetricsHandler(t *testing.T) {
	h := api.NewServer[*fakeMigration](measured(), "/run/x.sock").MetricsHandler()
	for _, tc := range []struct {
		method, path string
		status       int
	}{{"GET", "/metrics", 200}, {"POST", "/metrics", 404}, {"GET", "/", 404}, {"POST", "/v1/stop", 404}, {"GET", "/v1/info", 404}} {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(tc.method, tc.path, nil))
		if w.Code != tc.status {
			t.Errorf("%s %s: %d", tc.method, tc.path, w.Code)
		}
	}
}

// Readings at the same time as anything else; the race detector sees the rest.
func TestManyClients(t *testing.T) {
	c, _ := serve(t, t.TempDir(), "", measured())
	var clients sync.WaitGroup
	for range 100 {
		clients.Go(func() {
			for _, path := range []string{"/v1/info", "/metrics", "/v1/migrations", "/v1/openapi.json", "/v1/migrations/2"} {
				status, _, body := request(t, c, "GET", path, "")
				if status != http.StatusOK {
					t.Errorf("%s: %d %s", path, status, body)
				}
			}
		})
	}
	clients.Wait()
}

func BenchmarkMetrics(b *testing.B) {
	h := api.NewServer[*fakeMigration](measured(), "/run/x.sock").MetricsHandler()
	b.ReportAllocs()
	for b.Loop() {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/metrics", nil))
	}
}

// The dashboard in docs asks for metrics that are there.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("../../docs/grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(text, &board); err != nil || len(board.Panels) < 10 {
		t.Fatalf("%d panels, %v", len(board.Panels), err)
	}
	c, _ := serve(t, t.TempDir(), "db", measured())
	_, _, served := request(t, c, "GET", "/metrics", "")
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			for _, name := range regexp.MustCompile(`govmm_[a-z_]+`).FindAllString(target.Expr, -1) {
				if !strings.Contains(served, "\n"+name+"{") && !strings.Contains(served, "\n"+name+" ") {
					t.Errorf("panel %q asks for %s, which is not there", p.Title, name)
				}
			}
		}
	}
}

// While the guest stands still readings wait, for a second at most; what changes something does not.
func TestReadingsWaitForTheStop(t *testing.T) {
	vm := &fakeVM{standing: make(chan struct{})}
	c, _ := serve(t, t.TempDir(), "db", vm)
	began := time.Now()
	if status, _, body := request(t, c, "GET", "/v1/info", ""); status != 200 || time.Since(began) < time.Second {
		t.Errorf("%d %s after %v", status, body, time.Since(began))
	}
	read := make(chan int)
	go func() {
		status, _, _ := request(t, c, "GET", "/metrics", "")
		read <- status
	}()
	if status, _, body := request(t, c, "POST", "/v1/pause", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	close(vm.standing)
	if status := <-read; status != 200 {
		t.Errorf("%d", status)
	}
}

// While the guest is migrated readings come a hundred a second, and at the end of the migration
// at once; what changes something does not wait.
func TestReadingsArePaced(t *testing.T) {
	m := newFakeMigration()
	vm := &fakeVM{migration: m}
	c, _ := serve(t, t.TempDir(), "db", vm)
	ask := func() {
		if status, _, body := request(t, c, "GET", "/v1/info", ""); status != 200 {
			t.Errorf("%d %s", status, body)
		}
	}
	began := time.Now()
	for range 14 { // four of them at once
		ask()
	}
	if took := time.Since(began); took < 90*time.Millisecond {
		t.Errorf("14 readings in %v", took)
	}
	var all sync.WaitGroup
	for range 200 {
		all.Go(ask)
	}
	if status, _, body := request(t, c, "POST", "/v1/pause", ""); status != 200 {
		t.Errorf("%d %s", status, body)
	}
	m.end(migrate.Result{Status: "completed"})
	all.Wait()
}
