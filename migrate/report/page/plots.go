package page

import (
	"fmt"
	"html/template"
	"time"

	"github.com/go-analyze/charts"
	"github.com/govmm/govmm/migrate/report"
)

// plot is one picture, for a light and for a dark page.
type plot struct {
	Title, Caption string
	Light, Dark    template.HTML
}

const (
	plotWidth  = 720
	plotHeight = 260
	mib        = 1 << 20
)

// plotsOf are the pictures of a migration. One that would have nothing in it is left out.
func plotsOf(r *report.Result) (plots []plot, err error) {
	add := func(title, caption string, height int, draw func(p *charts.Painter, theme charts.ColorPalette) error) {
		if err != nil {
			return
		}
		one := plot{Title: title, Caption: caption}
		for _, theme := range []struct {
			name string
			to   *template.HTML
		}{{charts.ThemeLight, &one.Light}, {charts.ThemeDark, &one.Dark}} {
			p := charts.NewPainter(charts.PainterOptions{OutputFormat: charts.ChartOutputSVG, Width: plotWidth, Height: height})
			if err = draw(p, charts.GetTheme(theme.name).WithBackgroundColor(charts.ColorTransparent)); err != nil {
				return
			}
			var svg []byte
			if svg, err = p.Bytes(); err != nil {
				return
			}
			*theme.to = template.HTML(svg) // of numbers and of the words in this file
		}
		plots = append(plots, one)
	}
	if rounds := condense(r.Rounds); len(rounds) > 0 {
		stopped := r.Downtime > 0
		caption := "What each round sent, or did not need to."
		if stopped {
			caption += " The last one is the stop."
		}
		add("Rounds", caption, plotHeight, func(p *charts.Painter, t charts.ColorPalette) error {
			return drawRounds(p, t, rounds)
		})
		add("Memory left", "MiB that were to be sent when each round began, by the time since the first one.", plotHeight, func(p *charts.Painter, t charts.ColorPalette) error {
			return drawLines(p, t, rounds, []string{"MiB left"}, func(x round) []float64 { return []float64{float64(x.DirtyPages) * pageSize / mib} })
		})
		add("Link and guest", "MiB a second: what the link carried in each round, and what the guest wrote to its memory meanwhile.", plotHeight,
			func(p *charts.Painter, t charts.ColorPalette) error {
				names := []string{"link", "guest writes"}
				if last := rounds[len(rounds)-1]; !stopped && last.N == rounds[0].N {
					names = names[:1] // what it wrote in the only round nobody has counted
				}
				return drawLines(p, t, rounds, names, func(x round) []float64 {
					guest := float64(perSecond(x.written*pageSize, x.Duration)) / mib
					if !stopped && x.N == rounds[len(rounds)-1].N {
						guest = charts.GetNullValue()
					}
					return []float64{float64(perSecond(x.BytesSent, x.Duration)) / mib, guest}[:len(names)]
				})
			})
	}
	if r.Downtime > 0 {
		add("Downtime", "The parts of "+milliseconds(r.Downtime)+" in which the guest stood still, in milliseconds.", plotHeight+60,
			func(p *charts.Painter, t charts.ColorPalette) error { return drawDowntime(p, t, r.DowntimeParts) })
	}
	if r.PagesSent+r.PagesZero+r.PagesHole+r.PagesHinted > 0 {
		add("Pages", "MiB of memory by what became of it, summed over all rounds.", plotHeight-40, func(p *charts.Painter, t charts.ColorPalette) error {
			return drawPages(p, t, r)
		})
	}
	return plots, err
}

// round is one round, or several that follow each other, and what the guest wrote in it.
type round struct {
	report.RoundStats
	at      time.Duration // since the first one began
	written uint64        // pages
}

// mostRounds is how many rounds a picture shows.
const mostRounds = 40

// condense joins rounds, so that no picture has too many, and finds what was written in
// each: what the next one had to send.
func condense(all []report.RoundStats) (rounds []round) {
	per := (len(all) + mostRounds - 1) / mostRounds
	var at time.Duration
	for i, x := range all {
		written := uint64(0)
		if i+1 < len(all) {
			written = all[i+1].DirtyPages
		}
		if per > 1 && i%per != 0 && i < len(all)-1 { // the last one stays alone: it is the stop
			last := &rounds[len(rounds)-1]
			last.Duration += x.Duration
			last.PagesSent += x.PagesSent
			last.PagesZero += x.PagesZero
			last.PagesHole += x.PagesHole
			last.PagesHinted += x.PagesHinted
			last.BytesSent += x.BytesSent
			last.written += written
		} else {
			rounds = append(rounds, round{x, at, written})
		}
		at += x.Duration
	}
	return rounds
}

func drawRounds(p *charts.Painter, theme charts.ColorPalette, rounds []round) error {
	names := []string{"sent", "zeros", "hinted"}
	values := make([][]float64, len(names))
	var labels []string
	for _, x := range rounds {
		labels = append(labels, fmt.Sprint(x.N))
		for i, n := range []uint64{x.PagesSent, x.PagesZero, x.PagesHinted} {
			values[i] = append(values[i], float64(n)*pageSize/mib)
		}
	}
	opt := charts.NewBarChartOptionWithData(values)
	opt.Theme, opt.StackSeries = theme, charts.Ptr(true)
	opt.CategoryAxis.Labels, opt.Legend.SeriesNames = labels, names
	opt.ValueFormatter = inMiB
	return p.BarChart(opt)
}

func drawLines(p *charts.Painter, theme charts.ColorPalette, rounds []round, names []string, of func(round) []float64) error {
	values := make([][]float64, len(names))
	var labels []string
	if len(rounds) == 1 { // a line has two ends
		rounds = append(rounds, rounds[0])
		rounds[1].at += rounds[1].Duration
	}
	for _, x := range rounds {
		labels = append(labels, milliseconds(x.at))
		for i, v := range of(x) {
			values[i] = append(values[i], v)
		}
	}
	opt := charts.NewLineChartOptionWithData(values)
	opt.Theme, opt.XAxis.Labels, opt.Legend.SeriesNames = theme, labels, names
	opt.Legend.Show = charts.Ptr(len(names) > 1)
	opt.XAxis.BoundaryGap = charts.Ptr(false)
	opt.ValueFormatter = inMiB
	opt.YAxis = []charts.YAxisOption{{Min: charts.Ptr(0.0)}}
	return p.LineChart(opt)
}

func drawDowntime(p *charts.Painter, theme charts.ColorPalette, d report.Downtime) error {
	var values []float64
	var labels []string
	parts := downtimeParts(d)
	for i := len(parts) - 1; i >= 0; i-- { // the first one is at the top
		values = append(values, parts[i].took.Seconds()*1e3)
		labels = append(labels, parts[i].name)
	}
	opt := charts.NewBarChartOptionWithData([][]float64{values})
	opt.Theme, opt.Horizontal = theme, true
	opt.CategoryAxis.Labels = labels
	opt.ValueFormatter = func(v float64) string { return fmt.Sprintf("%.3g", v) }
	opt.SeriesList[0].Label.Show = charts.Ptr(true)
	return p.BarChart(opt)
}

// part is one part of a downtime.
type part struct {
	name string
	took time.Duration
}

func downtimeParts(d report.Downtime) []part {
	return []part{{"pause", d.Pause}, {"last sync", d.LastSync}, {"pages", d.Pages}, {"state", d.State}, {"storage", d.Storage},
		{"yield", d.Yield}, {"load", d.Load}, {"resume", d.Resume}, {"wire", d.Wire}}
}

func drawPages(p *charts.Painter, theme charts.ColorPalette, r *report.Result) error {
	labels := []string{"hinted", "holes", "zeros", "sent"}
	var values []float64
	for _, n := range []uint64{r.PagesHinted, r.PagesHole, r.PagesZero, r.PagesSent} {
		values = append(values, float64(n)*pageSize/mib)
	}
	opt := charts.NewBarChartOptionWithData([][]float64{values})
	opt.Theme, opt.Horizontal = theme, true
	opt.CategoryAxis.Labels, opt.ValueFormatter = labels, inMiB
	opt.SeriesList[0].Label.Show = charts.Ptr(true)
	return p.BarChart(opt)
}

func inMiB(v float64) string {
	if v >= 100 {
		return fmt.Sprintf("%.0f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
