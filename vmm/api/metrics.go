package api

import (
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/govmm/govmm/balloon"
	"github.com/govmm/govmm/internal/latency"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/virtio/blk"
	vnet "github.com/govmm/govmm/virtio/net"
	"github.com/govmm/govmm/vmm"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// maxScrapes is how many readings are made at once; further ones wait.
const maxScrapes = 4

// metrics makes what answers GET /metrics. Nothing is counted for it: each reading looks at
// what the VM counts anyway, stops nothing, and asks the guest nothing.
func (s *Server) metrics() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{s.vm})
	h := promhttp.HandlerFor(r, promhttp.HandlerOpts{DisableCompression: true, ErrorHandling: promhttp.HTTPErrorOnError})
	slots := make(chan struct{}, maxScrapes)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case slots <- struct{}{}:
			defer func() { <-slots }()
			h.ServeHTTP(w, r)
		case <-r.Context().Done():
		}
	})
}

// MetricsHandler serves GET /metrics and nothing else, for a listener of its own.
func (s *Server) MetricsHandler() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != metricsPath || r.Method != http.MethodGet && r.Method != http.MethodHead {
			http.Error(w, "only GET "+metricsPath+" is served here", http.StatusNotFound)
			return
		}
		s.metricsHandler().ServeHTTP(w, r)
	})
}

const metricsPath = "/metrics"

// collector is a VM as Prometheus sees it.
type collector struct{ vm Controller[Migration] }

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("govmm_"+name, help, labels, nil)
}

// Describe implements [prometheus.Collector]: which metrics there are depends on the machine.
func (c collector) Describe(chan<- *prometheus.Desc) {}

// sink sends metrics of the two plain types.
type sink chan<- prometheus.Metric

func (s sink) gauge(d *prometheus.Desc, v float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, valid(labels)...)
}

func (s sink) counter(d *prometheus.Desc, v float64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, v, valid(labels)...)
}

// valid makes names that files and guests have UTF-8.
func valid(labels []string) []string {
	for i, l := range labels {
		labels[i] = strings.ToValidUTF8(l, "?")
	}
	return labels
}

// Collect implements [prometheus.Collector].
func (c collector) Collect(ch chan<- prometheus.Metric) {
	out := sink(ch)
	info := c.vm.Info()
	state := desc("vm_state", "1 for the state that the VM is in, 0 for the others.", "name", "state")
	for _, s := range states {
		out.gauge(state, truth(s == info.State), info.Name, string(s))
	}
	out.gauge(desc("memory_bytes", "Memory that the guest has; 0 while a receiver does not know."), float64(info.Memory))
	c.process(out)
	for _, d := range info.Devices {
		switch i := d.Info.(type) {
		case *balloon.Info:
			out.gauge(desc("balloon_bytes", "Guest memory that the balloon holds."), float64(i.Actual))
			out.gauge(desc("balloon_target_bytes", "Guest memory that the balloon is to hold."), float64(i.Target))
		case *blk.Info:
			disk(out, d.Name, &i.Stats)
		case *vnet.Info:
			network(out, d.Name, i)
		}
	}
	if info.Incoming != nil {
		out.gauge(desc("incoming_received_bytes", "Bytes received of the migration that arrives."), float64(info.Incoming.BytesReceived))
	}
	migrations(out, c.vm.Migrations())
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

func (c collector) process(out sink) {
	s := c.vm.Stats()
	out.counter(desc("process_cpu_seconds_total", "Processor time of the VM's process, vCPUs included."), s.CPUTime.Seconds())
	if s.Resident != 0 {
		out.gauge(desc("process_resident_memory_bytes", "Memory of the VM's process that is resident, with what the guest has touched of its own."), float64(s.Resident))
	}
	seconds := desc("vcpu_seconds_total", "Processor time of a vCPU's thread since the machine was made; a reset makes another.", "vcpu")
	exits := desc("vcpu_exits_total", "Returns from the guest to the process, by reason, since the machine was made.", "vcpu", "kind")
	for i, v := range s.VCPUs {
		n := strconv.Itoa(i)
		out.counter(seconds, v.Time.Seconds(), n)
		for kind, count := range v.Exits {
			out.counter(exits, float64(count), n, kind)
		}
	}
}

func disk(out sink, name string, s *blk.Stats) {
	requests := desc("disk_requests_total", "Requests of the guest that were carried out.", "disk", "operation")
	for _, o := range []struct {
		op string
		n  uint64
	}{{"read", s.Reads}, {"write", s.Writes}, {"flush", s.Flushes}, {"other", s.Rest}} {
		out.counter(requests, float64(o.n), name, o.op)
	}
	bytes := desc("disk_bytes_total", "Bytes that the guest has read and written.", "disk", "operation")
	out.counter(bytes, float64(s.ReadBytes), name, "read")
	out.counter(bytes, float64(s.WrittenBytes), name, "write")
	out.counter(desc("disk_errors_total", "Requests that the host's storage failed.", "disk"), float64(s.Errors), name)
	buckets, sum := map[float64]uint64{}, uint64(0)
	for i, b := range latency.Bounds {
		sum += s.Latency.Buckets[i]
		buckets[b.Seconds()] = sum
	}
	out <- prometheus.MustNewConstHistogram(desc("disk_request_duration_seconds", "From when a request is fetched until storage has answered.", "disk"),
		s.Latency.Count(), s.Latency.Sum.Seconds(), buckets, valid([]string{name})...)
}

func network(out sink, name string, i *vnet.Info) {
	frames := desc("network_frames_total", "Frames to (receive) and from (transmit) the guest.", "device", "direction")
	bytes := desc("network_bytes_total", "Bytes to (receive) and from (transmit) the guest.", "device", "direction")
	dropped := desc("network_dropped_total", "Frames to (receive) and from (transmit) the guest that were dropped.", "device", "direction")
	out.counter(frames, float64(i.RxFrames), name, "receive")
	out.counter(frames, float64(i.TxFrames), name, "transmit")
	out.counter(bytes, float64(i.RxBytes), name, "receive")
	out.counter(bytes, float64(i.TxBytes), name, "transmit")
	out.counter(dropped, float64(i.RxDropped), name, "receive")
	out.counter(dropped, float64(i.TxDropped), name, "transmit")
}

// downtimeBounds are the buckets of downtimes, in seconds.
var downtimeBounds = []float64{.002, .005, .01, .02, .05, .1, .2, .3, .5, 1, 2, 5}

// phases are all that a migration can be in.
var phases = []migrate.Phase{migrate.PhaseConnecting, migrate.PhaseSetup, migrate.PhasePrecopy, migrate.PhaseSwitchover, migrate.PhaseHandoffUnknown, migrate.PhasePostcopy,
	migrate.PhaseCompleted, migrate.PhaseFailed, migrate.PhaseCancelled}

// migrations tells of the migrations that the VM remembers, and more of the last one.
func migrations(out sink, all []vmm.MigrationRecord) {
	ended := map[[2]string]float64{}
	var downtimes []time.Duration
	for _, r := range all {
		if r.Result == nil {
			continue
		}
		ended[[2]string{r.Result.Status, string(r.Result.Reason)}]++
		if r.Result.Status == string(migrate.PhaseCompleted) {
			downtimes = append(downtimes, r.Result.Downtime)
		}
	}
	total := desc("migrations", "Migrations from here that have ended, of the last 16, by how.", "status", "reason")
	for key, n := range ended {
		out.gauge(total, n, key[0], key[1])
	}
	histogram(out, downtimes)
	if len(all) == 0 {
		return
	}
	last := all[len(all)-1]
	p := last.Progress
	if p == nil {
		p = &migrate.Progress{Phase: migrate.Phase(last.Result.Status)}
	}
	phase := desc("migration_phase", "1 for the phase that the last migration from here is in, 0 for the others.", "phase")
	for _, one := range phases {
		out.gauge(phase, truth(one == p.Phase), string(one))
	}
	if last.Result == nil {
		underWay(out, p)
		return
	}
	res := last.Result
	out.gauge(desc("migration_rounds", "Rounds of the last migration."), float64(len(res.Rounds)))
	out.gauge(desc("migration_sent_bytes", "Bytes that the last migration has sent."), float64(res.BytesSent))
	out.gauge(desc("migration_throttle_ratio", "By how much the last migration slows the guest down, or has at most, 0 to 1."), float64(res.ThrottlePercent)/100)
	out.gauge(desc("migration_duration_seconds", "How long the last migration has taken."), res.Total.Seconds())
	pages := desc("migration_pages", "Pages of the last migration, by what became of them.", "kind")
	for kind, n := range map[string]uint64{"sent": res.PagesSent, "zero": res.PagesZero, "hole": res.PagesHole, "hinted": res.PagesHinted} {
		out.gauge(pages, float64(n), kind)
	}
	out.gauge(desc("migration_hints_received_pages", "Free pages that the guest hinted, as often as it did."), float64(res.HintsReceived))
	postcopy(out, res.Postcopy)
}

func underWay(out sink, p *migrate.Progress) {
	out.gauge(desc("migration_rounds", "Rounds of the last migration."), float64(p.Round))
	out.gauge(desc("migration_sent_bytes", "Bytes that the last migration has sent."), float64(p.BytesSent))
	out.gauge(desc("migration_throttle_ratio", "By how much the last migration slows the guest down, or has at most, 0 to 1."), float64(p.ThrottlePercent)/100)
	out.gauge(desc("migration_duration_seconds", "How long the last migration has taken."), p.Elapsed.Seconds())
	out.gauge(desc("migration_remaining_bytes", "Bytes of guest memory that are left to send."), float64(p.RemainingBytes))
	out.gauge(desc("migration_bandwidth_bytes_per_second", "Bandwidth of the last rounds."), float64(p.BandwidthBytes))
	out.gauge(desc("migration_dirty_rate_bytes_per_second", "How fast the guest wrote its memory in the last round."), float64(p.DirtyRateBytes))
	postcopy(out, p.Postcopy)
}

func postcopy(out sink, p *migrate.Postcopy) {
	if p == nil {
		return
	}
	out.gauge(desc("migration_postcopy_faults", "Faults of the destination's threads on pages that were missing when the guest moved."), float64(p.Faults))
	out.gauge(desc("migration_postcopy_missing_pages", "Pages that were missing when the guest moved."), float64(p.Pages))
	out.gauge(desc("migration_postcopy_stalled_seconds", "How long threads waited for missing pages, together."), p.Stalled.Seconds())
}

func histogram(out sink, downtimes []time.Duration) {
	buckets, sum := map[float64]uint64{}, 0.0
	for _, bound := range downtimeBounds {
		buckets[bound] = 0
	}
	for _, d := range downtimes {
		sum += d.Seconds()
		for _, bound := range downtimeBounds {
			if d.Seconds() <= bound {
				buckets[bound]++
			}
		}
	}
	out <- prometheus.MustNewConstHistogram(desc("migration_downtime_seconds", "How long the guest stood still in migrations from here that were completed, of the last 16."),
		uint64(len(downtimes)), sum, buckets)
}
