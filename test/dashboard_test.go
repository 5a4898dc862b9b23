package test

import (
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/go-analyze/charts"
	"github.com/govmm/govmm/internal/testenv"
)

// panel is a panel of docs/grafana.json.
type panel struct {
	Title, Type string
	GridPos     struct{ X, Y, W, H int }
	FieldConfig struct{ Defaults struct{ Unit string } }
	Targets     []struct{ Expr, LegendFormat string }
}

// series is one line of a panel.
type series struct {
	Metric map[string]string
	Values [][2]any // seconds, and a value as text
}

// TestDashboardHasData has Prometheus read two hosts' VMs while a guest moves from one to the
// other, and puts each expression of the dashboard to it: each has data. With GOVMM_DASHBOARD=FILE
// it draws the panels, as they are laid out in the dashboard.
func TestDashboardHasData(t *testing.T) {
	needKVM(t)
	testenv.NeedTools(t, "prometheus", "curl", "ping")
	text, err := os.ReadFile("../docs/grafana.json")
	testenv.Check(t, err)
	var board struct{ Panels []panel }
	testenv.Check(t, json.Unmarshal(text, &board))

	here, _ := newSites(t)
	pictured := os.Getenv("GOVMM_DASHBOARD")
	rate, warm, before := "32M", time.Second, 5*time.Second
	if pictured != "" {
		rate, warm, before = "8M", time.Minute, 20*time.Second // rates are of a minute
	}
	disk := filepath.Join(here.dir, "a.img")
	testenv.Check(t, os.WriteFile(disk, nil, 0o600))
	testenv.Check(t, os.Truncate(disk, 64<<20))
	shared := []string{"--net", "tap,bridge=" + here.bridge, "--disk", "path=" + disk + ",id=a", "--metrics-listen", "127.0.0.1:0"}
	run := here.start(append([]string{"run", "web", "--cpus", "2", "--memory", "256M", "--cmdline",
		"fill=128M dirty=8M rate=1000 verify=5 tick=1 disk=16M drate=300 ip=" + guestIP}, shared...)...)
	receive, addr := here.receive("web2", shared...)
	server := newPrometheus(t, here, metricsAt(t, run), metricsAt(t, receive))
	run.out.awaitTick(t, 0, "a first one", func(tick) bool { return true })
	ping := here.outside("ping", "-q", "-i", "0.1", guestIP)
	testenv.Check(t, ping.Start())
	t.Cleanup(func() { _ = ping.Process.Kill(); _ = ping.Wait() })

	time.Sleep(warm)
	began := time.Now()
	time.Sleep(before) // what a dashboard shows is a time
	if r, exit := here.migrate("web", "--to", addr, "--bandwidth-limit", rate); exit != 0 {
		t.Fatalf("%+v", r)
	}
	time.Sleep(before)
	all := map[string][][]series{}
	for _, p := range board.Panels {
		for _, target := range p.Targets {
			found := server.query(strings.ReplaceAll(target.Expr, "$instance", ".*"), began, time.Now())
			if !hasNumbers(found) {
				t.Errorf("panel %q: %s has no data", p.Title, target.Expr)
			}
			all[p.Title] = append(all[p.Title], found)
		}
	}
	if pictured != "" {
		testenv.Check(t, draw(pictured, board.Panels, all, began.Unix(), time.Now().Unix()))
	}
}

// metricsAt is the address at which a process serves its metrics.
func metricsAt(t *testing.T, p *proc) string {
	t.Helper()
	at := p.err.awaitText(t, 0, "metrics at http://")
	_, rest, _ := strings.Cut(p.err.snapshot()[at], "metrics at http://")
	addr, _, _ := strings.Cut(rest, "/")
	return addr
}

// outside is a command of the site, beside its VMs.
func (s *site) outside(args ...string) *exec.Cmd {
	return exec.Command("ip", append([]string{"netns", "exec", s.ns}, args...)...)
}

// prometheus is one that reads VMs of a site.
type prometheus struct {
	t    *testing.T
	site *site
	addr string
}

func newPrometheus(t *testing.T, s *site, here, there string) *prometheus {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "prometheus.yml")
	testenv.Check(t, os.WriteFile(config, fmt.Appendf(nil,
		"global: {scrape_interval: 500ms, scrape_timeout: 500ms}\nscrape_configs: [{job_name: govmm, static_configs: [{targets: [%q], labels: {instance: here}}, {targets: [%q], labels: {instance: there}}]}]\n", here, there), 0o600))
	var ln net.Listener
	s.in(t, func() (err error) { ln, err = net.Listen("tcp", "127.0.0.1:0"); return err })
	p := &prometheus{t, s, ln.Addr().String()}
	testenv.Check(t, ln.Close())
	cmd := s.outside("prometheus", "--config.file="+config, "--storage.tsdb.path="+filepath.Join(dir, "data"), "--web.listen-address="+p.addr, "--log.level=warn")
	log, err := os.Create(filepath.Join(dir, "log"))
	testenv.Check(t, err)
	cmd.Stdout, cmd.Stderr = log, log
	testenv.Check(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if b, err := os.ReadFile(log.Name()); err == nil && t.Failed() {
			t.Logf("prometheus:\n%s", b)
		}
	})
	for deadline := time.Now().Add(patience); s.outside("curl", "-sf", "http://"+p.addr+"/-/ready").Run() != nil; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("prometheus does not begin")
		}
	}
	return p
}

// query asks for a time.
func (p *prometheus) query(expr string, from, to time.Time) []series {
	p.t.Helper()
	out, err := p.site.outside("curl", "-s", "-G", "http://"+p.addr+"/api/v1/query_range", "--data-urlencode", "query="+expr, "-d", "step=1",
		"-d", fmt.Sprint("start=", from.Unix()), "-d", fmt.Sprint("end=", to.Unix())).Output()
	testenv.Check(p.t, err)
	var answer struct {
		Status string
		Data   struct{ Result []series }
	}
	if err := json.Unmarshal(out, &answer); err != nil || answer.Status != "success" {
		p.t.Fatalf("%s: %s (%v)", expr, out, err)
	}
	return answer.Data.Result
}

// hasNumbers reports whether a series has a value that is a number.
func hasNumbers(list []series) bool {
	for _, s := range list {
		for _, v := range s.Values {
			if x, err := strconv.ParseFloat(v[1].(string), 64); err == nil && !math.IsNaN(x) {
				return true
			}
		}
	}
	return false
}

// draw draws panels as they are laid out, 24 columns wide.
func draw(file string, panels []panel, all map[string][][]series, first, last int64) error {
	const column, row = 50, 34
	height := 0
	for _, p := range panels {
		height = max(height, p.GridPos.Y+p.GridPos.H)
	}
	page := charts.NewPainter(charts.PainterOptions{OutputFormat: charts.ChartOutputPNG, Width: 24 * column, Height: height * row})
	page.FilledRect(0, 0, 24*column, height*row, charts.ColorWhite, charts.ColorWhite, 0)
	for _, p := range panels {
		x, y := p.GridPos.X*column, p.GridPos.Y*row
		child := page.Child(charts.PainterBoxOption(charts.NewBox(x, y, x+p.GridPos.W*column, y+p.GridPos.H*row)))
		if err := p.draw(child, all[p.Title], first, last); err != nil {
			return fmt.Errorf("%s: %w", p.Title, err)
		}
	}
	b, err := page.Bytes()
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o644)
}

var label = regexp.MustCompile(`\{\{(\w+)\}\}`)

// draw draws one: as lines, or those whose value is there at the end, as words.
func (p panel) draw(to *charts.Painter, targets [][]series, first, last int64) error {
	type line struct {
		name string
		at   map[int64]float64
	}
	var lines []line
	for i, found := range targets {
		for _, s := range found {
			l := line{label.ReplaceAllStringFunc(p.Targets[i].LegendFormat, func(m string) string { return s.Metric[m[2:len(m)-2]] }), map[int64]float64{}}
			if dir, _, ok := strings.Cut(l.name, "/"); ok { // where a disk lies is not of interest here
				_, file := filepath.Split(l.name)
				l.name = dir + file
			}
			for _, v := range s.Values {
				at := int64(v[0].(float64))
				x, err := strconv.ParseFloat(v[1].(string), 64)
				if err == nil && !math.IsNaN(x) {
					l.at[at] = x
				}
			}
			if len(l.at) > 0 {
				lines = append(lines, l)
			}
		}
	}
	if p.Type == "stat" {
		var words []string
		for _, l := range lines {
			words = append(words, l.name)
		}
		for i, s := range []string{p.Title, strings.Join(words, ", ")} {
			to.Text(s, 20, 25+35*i, 0, charts.NewFontStyleWithSize(12).WithColor(charts.ColorBlack))
		}
		return nil
	}
	var values [][]float64
	var names, times []string
	for at := first; at <= last; at++ {
		times = append(times, fmt.Sprintf("%d s", at-first))
	}
	for _, l := range lines {
		row := make([]float64, len(times))
		for i := range row {
			row[i] = charts.GetNullValue()
			if v, ok := l.at[first+int64(i)]; ok {
				row[i] = v
			}
		}
		values, names = append(values, row), append(names, l.name)
	}
	opt := charts.NewLineChartOptionWithData(values)
	opt.Title.Text = p.Title
	opt.Legend.SeriesNames, opt.XAxis.Labels = names, times
	opt.Legend.Offset = charts.OffsetRight
	opt.XAxis.BoundaryGap = charts.Ptr(false)
	opt.XAxis.LabelCount = 6
	opt.Symbol.Shape = charts.SymbolNone
	opt.YAxis = []charts.YAxisOption{{Min: charts.Ptr(0.0)}}
	opt.ValueFormatter = func(v float64) string { return inUnit(v, p.FieldConfig.Defaults.Unit) }
	return to.LineChart(opt)
}

// inUnit writes a value in a unit of Grafana's.
func inUnit(v float64, unit string) string {
	switch unit {
	case "percentunit":
		return fmt.Sprintf("%.0f%%", v*100)
	case "s":
		return fmt.Sprintf("%.3g ms", v*1e3)
	case "bytes", "Bps":
		text := "B"
		for _, next := range []string{"KiB", "MiB", "GiB"} {
			if v < 1024 {
				break
			}
			v, text = v/1024, next
		}
		return fmt.Sprintf("%.3g %s%s", v, text, map[string]string{"Bps": "/s"}[unit])
	}
	return fmt.Sprintf("%.3g/s", v)
}
