package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/govmm/govmm/internal/screen"
	"github.com/govmm/govmm/migrate"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"golang.org/x/term"
)

// topHelp is what the key h shows.
var topHelp = strings.Split(`up, down, j, k      select a VM
PgUp, PgDn, g, G    a page, the first one, the last one
<, >                sort by another column; r: the other way round

p, blank            pause the VM, or let it go on
m                   migrate it: asks for the address that govmm receive prints
x                   cancel its migration
c, Enter            open its serial port; Ctrl-A d comes back
d                   measure how fast it writes its memory, for a second
e                   what has happened to it
q, Ctrl-C           leave; migrations go on
Ctrl-Z, Ctrl-L      stop this program; draw the screen again

CPU% is of the VM's process: 100 is one processor. RES is what its process has of
this host's memory. READ/s and WRIT/s are bytes of disks, RECV/s and SENT/s
of networks. DIRTY/s is what the guest writes: measured by its migration, or by d.`, "\n")

// key does what a key means.
func (v *topView) key(ctx context.Context, k screen.Key) {
	switch {
	case k == screen.CtrlC && v.prompt == nil && v.text == nil:
		v.leaves = true
	case k == screen.CtrlL:
		v.screen.Redraw()
	case k == screen.CtrlZ:
		v.screen.Suspend()
	case v.prompt != nil:
		v.promptKey(ctx, k)
	case v.text != nil:
		v.textKey(k)
	default:
		v.message, v.chosen = "", true
		if !v.move(k) && v.acts {
			v.act(ctx, k)
		}
	}
}

func (v *topView) textKey(k screen.Key) {
	switch k {
	case screen.Up, 'k':
		v.from--
	case screen.Down, 'j':
		v.from++
	case screen.PageUp:
		v.from -= v.page
	case screen.PageDown:
		v.from += v.page
	default:
		v.text, v.from = nil, 0
	}
}

// move does what only changes how the table is shown, and reports whether k means that.
func (v *topView) move(k screen.Key) bool {
	at := v.at
	switch k {
	case 'q', 'Q':
		v.leaves = true
	case screen.Up, 'k':
		at--
	case screen.Down, 'j':
		at++
	case screen.PageUp:
		at -= v.page
	case screen.PageDown:
		at += v.page
	case screen.Home, 'g':
		at = 0
	case screen.End, 'G':
		at = len(v.rows) - 1
	case '<', screen.Left, '>', screen.Right:
		keys := sortable(v.columns)
		step := 1
		if k == '<' || k == screen.Left {
			step = len(keys) - 1
		}
		v.fleet.sort = keys[(slices.Index(keys, v.fleet.sort)+step)%len(keys)]
	case 'r':
		v.fleet.reverse = !v.fleet.reverse
	default:
		return false
	}
	if at = min(max(at, 0), len(v.rows)-1); at >= 0 {
		v.selected, v.at = v.rows[at].name, at
	}
	return true
}

// act does what a key means for the VM that is selected.
func (v *topView) act(ctx context.Context, k screen.Key) {
	if k == 'h' || k == '?' {
		v.text = topHelp
		return
	}
	r := v.current()
	if r == nil || r.client == nil {
		return
	}
	switch k {
	case 'p', ' ':
		v.pause(ctx, r)
	case 'm':
		v.prompt = &prompt{question: "migrate " + r.name + " to ", done: func(to string) { v.migrate(ctx, r, to) }}
	case 'x':
		if r.migrating() == nil {
			v.say("%s does not migrate", r.name)
			return
		}
		v.prompt = &prompt{question: "cancel the migration of " + r.name + "? (y) ", one: true, done: func(a string) {
			if a == "y" {
				v.do(ctx, r, "cancelling", "", func(c *api.Client) (vmm.State, error) { return "", c.Cancel(ctx) })
			}
		}}
	case 'c', screen.Enter:
		v.console(ctx, r)
	case 'd':
		v.measure(ctx, r)
	case 'e':
		v.events(ctx, r)
	}
}

// do does something to a VM aside, and says how it ended. action returns the state in which
// the VM is then; "": it does not know.
func (v *topView) do(ctx context.Context, r *vmRow, acts, done string, action func(*api.Client) (vmm.State, error)) {
	if r.acts != "" {
		v.say("%s: %s is not done yet", r.name, r.acts)
		return
	}
	r.acts = acts
	client := r.client // the row belongs to this goroutine
	go func() {
		state, err := action(client)
		v.later(ctx, func() {
			r.acts = ""
			switch {
			case err != nil:
				v.say("%s: %v", r.name, advise(err))
			case done != "":
				v.say("%s %s", r.name, done)
			}
			if err == nil && state != "" {
				r.state = state
			}
		})
	}()
}

func (v *topView) pause(ctx context.Context, r *vmRow) {
	if r.state == vmm.StatePaused {
		v.do(ctx, r, "resuming", "goes on", func(c *api.Client) (vmm.State, error) {
			info, err := c.Resume(ctx, false)
			return info.State, err
		})
		return
	}
	v.do(ctx, r, "pausing", "is paused", func(c *api.Client) (vmm.State, error) {
		info, err := c.Pause(ctx)
		return info.State, err
	})
}

func (v *topView) measure(ctx context.Context, r *vmRow) {
	if r.measures {
		return
	}
	r.measures = true
	client := r.client
	go func() {
		d, err := client.DirtyRate(ctx, api.DirtyRateRequest{})
		v.later(ctx, func() {
			if r.measures = false; err != nil {
				v.say("%s: %v", r.name, advise(err))
				return
			}
			r.dirty, r.dirtyAt = rate{float64(d.BytesPerSecond), true}, time.Now()
		})
	}()
}

// migrate starts a migration, which goes on if the user leaves.
func (v *topView) migrate(ctx context.Context, r *vmRow, to string) {
	f := migrateFlags{to: to, tlsDir: v.tlsDir}
	req := api.MigrateRequest{Trigger: "cli"}
	var err error
	if req.To, err = f.address(); err == nil {
		err = api.ValidateAddress(req.To)
	}
	if err == nil {
		err = f.checkTLS()
	}
	if err == nil {
		req.TLS, err = f.credentials()
	}
	if err != nil {
		v.say("%v", err)
		return
	}
	v.say("%s migrates to %s", r.name, to)
	client, name := r.client, r.name
	go func() {
		res, err := client.Migrate(context.WithoutCancel(ctx), req, nil)
		v.later(ctx, func() {
			switch {
			case err != nil:
				v.say("%s: migrate to %s: %v", name, to, advise(err))
			case res.Status == string(migrate.PhaseCompleted):
				v.say("%s has moved to %s in %s, and stood still for %s", name, to, formatMS(res.Total), formatMS(res.Downtime))
			default:
				v.say("%s: migration to %s %s: %s", name, to, res.Status, res.Error)
			}
		})
	}()
}

// events shows what has happened to a VM.
func (v *topView) events(ctx context.Context, r *vmRow) {
	name, client := r.name, r.client
	go func() {
		asking, cancel := context.WithTimeout(ctx, answerTime)
		defer cancel()
		lines := []string{"what has happened to " + name + ", the last first", ""}
		err := client.Events(asking, 0, false, func(e vmm.Event) error {
			var b strings.Builder
			err := printEvent(&b, e)
			lines = append(lines, plain(strings.TrimSuffix(b.String(), "\n")))
			return err
		})
		slices.Reverse(lines[2:])
		v.later(ctx, func() {
			if err != nil {
				v.say("%s: %v", name, err)
				return
			}
			v.text, v.from = lines, 0
		})
	}()
}

// console gives the terminal to govmm console, and takes it back when that ends.
func (v *topView) console(ctx context.Context, r *vmRow) {
	if err := v.screen.Lend(); err != nil {
		v.say("%v", err)
		return
	}
	defer v.screen.Take()
	before, _ := term.GetState(int(os.Stdin.Fd()))
	var said tail
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "console", "--api-socket", r.client.Socket())
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Second
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, &said
	fmt.Printf("govmm: the serial port of %s; Ctrl-A d comes back\n", r.name)
	err := cmd.Run()
	if before != nil { // it may have ended without doing so
		_ = term.Restore(int(os.Stdin.Fd()), before)
	}
	if err != nil && ctx.Err() == nil {
		v.say("%s: %s", r.name, said.last(err))
	}
}

// tail writes to stderr, and keeps the end of it.
type tail struct{ end []byte }

func (t *tail) Write(p []byte) (int, error) {
	const most = 1000
	t.end = append(t.end, p...)
	t.end = t.end[max(len(t.end)-most, 0):]
	return os.Stderr.Write(p)
}

// last is the last line, or err if there is none.
func (t *tail) last(err error) string {
	lines := strings.FieldsFunc(string(t.end), func(r rune) bool { return r == '\n' || r == '\r' })
	if len(lines) == 0 {
		return err.Error()
	}
	return strings.TrimPrefix(lines[len(lines)-1], "govmm: ")
}

// prompt is a question and what the user has typed so far.
type prompt struct {
	question string
	text     []byte
	one      bool // one key answers it
	done     func(string)
}

// line is the question with the end of the answer, so that what is typed is seen.
func (p *prompt) line(width int) string {
	s := p.question + string(p.text) + "_"
	if width > 0 && len(s) > width {
		return s[len(s)-width:]
	}
	return s
}

func (v *topView) promptKey(_ context.Context, k screen.Key) {
	const longest = 300
	p := v.prompt
	answer := func(s string) {
		v.prompt = nil
		p.done(s)
	}
	switch {
	case k == screen.Escape, k == screen.CtrlC, k == screen.CtrlD:
		v.prompt = nil
	case p.one && k > 0:
		answer(string(rune(k)))
	case k == screen.Enter && len(p.text) == 0:
		v.prompt = nil
	case k == screen.Enter:
		answer(string(p.text))
	case k == screen.Backspace, k == screen.CtrlH:
		p.text = p.text[:max(len(p.text)-1, 0)]
	case k == screen.CtrlU, k == screen.CtrlW:
		p.text = nil
	case k > ' ' && k <= '~' && len(p.text) < longest:
		p.text = append(p.text, byte(k))
	}
}
