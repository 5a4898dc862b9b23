package migrate

import (
	"context"
	"errors"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/govmm/govmm/mempage"
)

// moveTo migrates src to r in memory, and returns when r has served all connections.
func moveTo(r *Receiver, m *Migration) error {
	var served sync.WaitGroup
	m.peer.dial = func(context.Context, string) (net.Conn, error) {
		a, b := net.Pipe()
		served.Go(func() { r.serveConn(context.Background(), b) })
		return a, nil
	}
	_, err := m.Run(context.Background())
	served.Wait()
	return err
}

// Two hosts, one of which knows a feature more, understand each other in both directions,
// unless the feature is in use: then the older one refuses it by name before it builds a
// machine, and the guest goes on at the source.
func TestPeersThatDifferByAFeature(t *testing.T) {
	const later = "warp"
	for _, c := range []struct {
		name      string
		used      bool
		known     []string
		compress  Compression
		refusedBy string
	}{
		{name: "newer to older, in use", used: true, known: knownFeatures, refusedBy: later},
		{name: "newer to older, not in use", known: knownFeatures},
		{name: "older to newer", known: append(slices.Clone(knownFeatures), later)},
		{name: "a destination that does not compare storage", known: []string{featureVerifyPages}},
		{name: "newer to newer, in use", used: true, known: append(slices.Clone(knownFeatures), later)},
		{name: "a compression that is not known", known: []string{featureVerifyPages, featureLZ4}, compress: CompressZstd, refusedBy: featureZstd},
	} {
		t.Run(c.name, func(t *testing.T) {
			runs := &whoRuns{t: t, who: map[string]bool{}}
			src := newToySource(t, runs)
			dst := &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs}
			built := false
			r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
				built = true
				return dst, nil
			}), nil)
			r.known = c.known
			m := New(src, "the other host", Options{Compression: c.compress, VerifyPages: true})
			if c.used {
				m.features = append(m.features, later)
			}
			err := moveTo(r, m)
			if c.refusedBy == "" {
				if err != nil || !runs.is("destination") {
					t.Fatalf("%v; the guest runs there: %v", err, runs.is("destination"))
				}
				return
			}
			if !errors.Is(err, ErrRefused) || !strings.HasSuffix(err.Error(), "not known here: "+c.refusedBy) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %v, want one line that names %s only", err, c.refusedBy)
			}
			if built || m.Result().PagesSent != 0 || !runs.is("source") {
				t.Errorf("built: %v, %d pages sent, the guest runs at the source: %v", built, m.Result().PagesSent, runs.is("source"))
			}
		})
	}
}

// What a later version adds to CONFIG without a feature that names it is ignored.
func TestUnknownFieldsOfConfig(t *testing.T) {
	p := newPipeSession(t)
	var got string
	p.recv.builder = buildFunc(func(_ context.Context, machine []byte) (Target, error) {
		got = string(machine)
		return p.target, nil
	})
	h := newHello(purposeMigrate, sessionID{1})
	h.dataChannels = 1
	p.control = p.dial(h)
	p.read(p.control, frameHelloOK)
	p.write(p.control, new(stream).control(frameConfig, map[string]any{
		"machine": []byte("the machine"), "since_4": map[string]any{"depth": 7, "names": []string{"a", "b"}}}))
	p.data = append(p.data, p.dial(dataHello(1, 1)))
	p.read(p.control, frameReady)
	if got != "the machine" {
		t.Errorf("built from %q", got)
	}
}

// previewSource and previewTarget are a toy of which the state is known in part.
type previewSource struct {
	*toySource
	preview string
}

func (s previewSource) PreviewState() ([]byte, error) { return []byte(s.preview), nil }

type previewTarget struct {
	*toyTarget
	checked *[]string
}

func (p previewTarget) CheckPreview(preview []byte) error {
	*p.checked = append(*p.checked, string(preview))
	if string(preview) == "bad" {
		return errors.Join(openly("one"), openly("two"))
	}
	return nil
}

// TestPreview: what a source foresees of its state is checked before any memory is sent.
// A machine that it does not fit is freed, and the source is told why. Either side may be
// one that knows nothing of it.
func TestPreview(t *testing.T) {
	for _, c := range []struct {
		name         string
		preview      string
		older, newer bool // the source, or the destination only
		checks       int
		refused      bool
	}{
		{name: "good", preview: "good", checks: 1},
		{name: "bad", preview: "bad", checks: 1, refused: true},
		{name: "nothing is known", preview: ""},
		{name: "an older source", older: true},
		{name: "an older destination", preview: "bad", newer: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			runs := &whoRuns{t: t, who: map[string]bool{}}
			toy := newToySource(t, runs)
			discarded := 0
			dst := &toyTarget{heapTarget: heapTarget{t: t, mem: [2][]byte{make([]byte, 70*mempage.Size), make([]byte, 66*mempage.Size)}}, runs: runs,
				step: func(step string) error {
					if step == "discard" {
						discarded++
					}
					return nil
				}}
			var checked []string
			r := NewReceiver(buildFunc(func(context.Context, []byte) (Target, error) {
				if c.newer {
					return dst, nil
				}
				return previewTarget{dst, &checked}, nil
			}), nil)
			var src Source = previewSource{toy, c.preview}
			if c.older {
				src = toy
			}
			m := New(src, "the other host", Options{})
			err := moveTo(r, m)
			if len(checked) != c.checks || c.checks > 0 && checked[0] != c.preview {
				t.Errorf("checked %q", checked)
			}
			if !c.refused {
				if err != nil || !runs.is("destination") {
					t.Errorf("%v; the guest runs there: %v", err, runs.is("destination"))
				}
				return
			}
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "one; two") {
				t.Errorf("error %v, want a refusal", err)
			}
			if discarded != 1 || m.Result().PagesSent != 0 || !runs.is("source") {
				t.Errorf("discarded %d times, %d pages sent, the guest runs at the source: %v", discarded, m.Result().PagesSent, runs.is("source"))
			}
		})
	}
}
