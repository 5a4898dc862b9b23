// Package page makes a page of what a migration reports: one self-contained HTML file with
// plots, for people who want to know why a migration took what it took.
package page

import (
	"embed"
	"fmt"
	"html/template"
	"io"
	"time"

	"github.com/govmm/govmm/internal/units"
	"github.com/govmm/govmm/migrate/report"
)

// Record is a migration that has ended.
type Record struct {
	ID          string
	Source      string // the VM's name
	Destination string // its address
	Began       time.Time
	Result      report.Result
}

//go:embed page.html
var files embed.FS

// Write writes the page of a record.
func Write(w io.Writer, r Record) error {
	t, err := template.New("page.html").Funcs(template.FuncMap{
		"bytes": units.Bytes, "ms": milliseconds, "pages": func(n uint64) string { return units.Bytes(n * pageSize) },
		"rate": func(n uint64, d time.Duration) string { return units.Bytes(perSecond(n, d)) + "/s" },
	}).ParseFS(files, "page.html")
	if err != nil {
		return fmt.Errorf("the template of the report: %w", err)
	}
	p, err := plotsOf(&r.Result)
	if err != nil {
		return fmt.Errorf("plot a migration: %w", err)
	}
	return t.Execute(w, struct {
		Record
		Title   string
		Tiles   []tile
		Plots   []plot
		Remarks []string
	}{r, fmt.Sprintf("%s: %s", r.Source, r.Result.Status), tilesOf(&r.Result), p, Remarks(&r.Result)})
}

// tile is one figure at the head of the page.
type tile struct{ Name, Value, More string }

const pageSize = 4096

func tilesOf(r *report.Result) []tile {
	tiles := []tile{
		{"total", milliseconds(r.Total), "set-up " + milliseconds(r.Setup)},
		{"downtime", milliseconds(r.Downtime), ""},
		{"memory", units.Bytes(r.RAMBytes), units.Bytes(r.PagesSent*pageSize) + " with content"},
		{"sent", units.Bytes(r.BytesSent), fmt.Sprintf("%d connections", r.Channels)},
	}
	if r.DiskBytes > 0 {
		tiles = append(tiles, tile{"disks", units.Bytes(r.DiskBytes), units.Bytes(r.DiskBytesSent) + " sent"})
	}
	if p := r.Postcopy; p != nil {
		tiles = append(tiles, tile{"postcopy", milliseconds(p.Duration), fmt.Sprintf("%d faults, p99 %s", p.Faults, milliseconds(p.P99))})
	}
	if r.ThrottlePercent > 0 {
		tiles = append(tiles, tile{"slowed down", fmt.Sprintf("%d%%", r.ThrottlePercent), "at most"})
	}
	return tiles
}

// milliseconds is a duration for people.
func milliseconds(d time.Duration) string {
	switch {
	case d == 0:
		return "0"
	case d < 10*time.Millisecond:
		return fmt.Sprintf("%.2f ms", d.Seconds()*1e3)
	case d < 10*time.Second:
		return fmt.Sprintf("%.0f ms", d.Seconds()*1e3)
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

func perSecond(n uint64, d time.Duration) uint64 {
	if d <= 0 {
		return 0
	}
	return uint64(float64(n) / d.Seconds())
}
