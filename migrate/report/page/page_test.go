package page

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/govmm/govmm/migrate/report"
)

func records() map[string]Record {
	began := time.Date(2026, 11, 27, 12, 0, 0, 0, time.UTC)
	ms := time.Millisecond
	parts := report.Downtime{Pause: 200 * time.Microsecond, LastSync: 20 * time.Microsecond, Pages: 800 * time.Microsecond, State: 100 * time.Microsecond,
		Load: 500 * time.Microsecond, Resume: 250 * time.Microsecond, Wire: 120 * time.Microsecond}
	easy := report.Result{Status: "completed", Total: 420 * ms, Setup: 30 * ms, Downtime: parts.Sum(), DowntimeParts: parts, BytesSent: 600 << 20, RAMBytes: 1 << 30,
		PagesSent: 153000, PagesZero: 20, PagesHole: 109000, Channels: 2, Compression: "none", HintsOff: "the machine has no balloon",
		Rounds: []report.RoundStats{{N: 0, Duration: 380 * ms, DirtyPages: 262144, PagesSent: 152900, PagesZero: 20, PagesHole: 109000, BytesSent: 599 << 20},
			{N: 1, Duration: 2 * ms, DirtyPages: 100, PagesSent: 100, BytesSent: 400 << 10}}}
	busy := easy
	busy.ThrottlePercent, busy.StopsUndone, busy.UndoneNote, busy.DowntimeNote = 60, 2, "9000 pages were left, expected 200", "storage took longer than ever before"
	busy.Rounds, busy.Total = nil, 30*time.Second
	for i := range 130 {
		busy.Rounds = append(busy.Rounds, report.RoundStats{N: i, Duration: 230 * ms, DirtyPages: uint64(30000 - 200*i), PagesSent: uint64(29000 - 190*i), PagesHinted: 50, BytesSent: uint64(29000-190*i) * 4096})
	}
	post := easy
	post.Postcopy = &report.Postcopy{Pages: 50000, Duration: 900 * ms, Faults: 812, P50: 300 * time.Microsecond, P99: 2 * ms, Longest: 7 * ms}
	post.DiskBytes, post.DiskBytesSent = 4<<30, 1<<30
	failed := report.Result{Status: "failed", Error: "refused by the destination: <script>alert(1)</script>"}
	out := map[string]Record{}
	for name, r := range map[string]report.Result{"easy": easy, "busy": busy, "postcopy": post, "failed": failed} {
		out[name] = Record{ID: "0123abcd", Source: "web", Destination: "other:7000", Began: began, Result: r}
	}
	return out
}

// Every page is well formed, loads nothing from elsewhere, and shows no word of a peer as
// markup.
func TestPages(t *testing.T) {
	for name, r := range records() {
		var b bytes.Buffer
		if err := Write(&b, r); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		text := b.String()
		for _, bad := range []string{"<script", "http://", "https://", "NaN", "Inf", "<no value>"} {
			if strings.Contains(strings.ReplaceAll(text, "http://www.w3.org/", ""), bad) {
				t.Errorf("%s: it has %q", name, bad)
			}
		}
		if n := strings.Count(text, "<svg"); name != "failed" && n != 10 || name == "failed" && n != 0 {
			t.Errorf("%s: %d pictures", name, n)
		}
		for _, svg := range strings.SplitAfter(text, "</svg>") {
			at := strings.Index(svg, "<svg")
			if at < 0 {
				continue
			}
			d := xml.NewDecoder(strings.NewReader(svg[at:]))
			for {
				if _, err := d.Token(); errors.Is(err, io.EOF) {
					break
				} else if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
			}
		}
		if len(text) > 1<<20 {
			t.Errorf("%s: %d bytes", name, len(text))
		}
	}
}

// What limited a migration is said.
func TestRemarks(t *testing.T) {
	for name, wants := range map[string][]string{
		"easy":     {"The link carried 1.5", "The largest part of the downtime was pages, 0.80 ms of 1.99 ms", "not asked for its free memory"},
		"busy":     {"--auto-converge", "slowed down by up to 60%", "2 earlier stops were undone"},
		"postcopy": {"with 195 MiB of its memory missing", "disks were copied first"},
		"failed":   {"It ended with: refused"},
	} {
		r := records()[name]
		all := strings.Join(Remarks(&r.Result), "\n")
		for _, want := range wants {
			if !strings.Contains(all, want) {
				t.Errorf("%s: %q is not in\n%s", name, want, all)
			}
		}
	}
}

// TestInABrowser renders pages in a browser, as on a desk, on a phone and in the dark. A
// picture must have many colours: a page that does not draw is one colour.
func TestInABrowser(t *testing.T) {
	browser, err := exec.LookPath("chromium")
	if err != nil {
		t.Skip("SKIPPED: needs chromium (test/setup.sh installs it)")
	}
	dir := t.TempDir()
	if keep := os.Getenv("GOVMM_TEST_PICTURES"); keep != "" {
		dir = keep
	}
	for name, r := range records() {
		file := filepath.Join(dir, name+".html")
		var b bytes.Buffer
		if err := Write(&b, r); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, b.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, view := range [][]string{{"desk", "--window-size=1000,2600"}, {"phone", "--window-size=500,3000"}, {"dark", "--window-size=1000,2600", "--force-dark-mode", "--blink-settings=preferredColorScheme=0"}} {
			if name != "busy" && view[0] != "desk" {
				continue
			}
			picture := filepath.Join(dir, name+"-"+view[0]+".png")
			args := append([]string{"--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--user-data-dir=" + filepath.Join(t.TempDir(), "profile"),
				"--screenshot=" + picture, "file://" + file}, view[1:]...)
			cmd := exec.Command(browser, args...)
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("chromium: %v\n%s", err, out)
			}
			if n := colours(t, picture); n < 30 {
				t.Errorf("%s: %d colours", picture, n)
			}
		}
	}
}

// Of a migration that was given up no round is the stop, and nobody knows what the guest
// wrote in the last one.
func TestPlotsOfWhatWasGivenUp(t *testing.T) {
	r := report.Result{Status: "cancelled", RAMBytes: 64 << 20, Rounds: []report.RoundStats{{Duration: time.Second, DirtyPages: 1 << 14, PagesSent: 100, BytesSent: 1 << 20}}}
	for rounds, want := range map[int]int{1: 0, 2: 1} {
		if rounds == 2 {
			r.Rounds = append(r.Rounds, report.RoundStats{N: 1, Duration: time.Second, DirtyPages: 512, PagesSent: 512, BytesSent: 2 << 20})
		}
		plots, err := plotsOf(&r)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(plots[0].Caption, "the stop") {
			t.Errorf("%q", plots[0].Caption)
		}
		if got := strings.Count(string(plots[2].Light), ">guest writes<"); plots[2].Title != "Link and guest" || got != want {
			t.Errorf("%d rounds: %q says %d times what the guest writes, want %d", rounds, plots[2].Title, got, want)
		}
	}
}
