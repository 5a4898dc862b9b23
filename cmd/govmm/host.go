package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/govmm/govmm/internal/fdpass"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/govmm/govmm/vmm/serial"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"
)

// hostFlags are the flags of the commands whose process holds a VM: run and
// receive.
type hostFlags struct {
	serial     string
	console    string
	socket     string
	tracking   string
	sandbox    string
	user       string
	ports      []uint
	overcommit bool
	metricsFlags

	config string
	file   *configFile // nil: --config is not given
	json   bool        // of receive
}

func (f *hostFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "`FILE` (YAML or JSON) that says what flags can say, under the same names; flags win (govmm config)")
	f.registerSet(cmd.Flags())
}

func (f *hostFlags) registerSet(flags *pflag.FlagSet) {
	flags.StringVar(&f.serial, "serial", "stdio", "`WHERE` the guest's serial port leads: stdio, file:PATH[,max=SIZE] (64M; then it becomes PATH.1), unix:PATH or null")
	flags.StringVar(&f.console, "console", "none", "`WHERE` the guest's virtio console (hvc0) leads, as --serial; none: nowhere, and govmm run then makes no such device")
	flags.StringVar(&f.tracking, "dirty-tracking", string(machine.TrackAuto),
		"`HOW` KVM tracks the guest's writes when it is migrated from here: auto, bitmap or ring")
	flags.BoolVar(&f.overcommit, "overcommit", false, "let the guest have more memory than is available here now: if it uses all, the host swaps, or its kernel ends a process")
	flags.StringVar(&f.sandbox, "sandbox", string(sandbox.Auto), "`WHAT` happens when this process makes a system call that it does not need: on (it ends), log (it is reported) or off; on also takes files, TCP ports and capabilities from it, and auto is on as far as this host gives what that needs (docs/security.md)")
	flags.StringVar(&f.user, "user", "", "`UID[:GID]`, or names, that this process becomes when everything is open, if it was started by root")
	flags.UintSliceVar(&f.ports, "migrate-ports", nil, "the TCP `PORTS` that the sandbox lets a migration from here connect to, as in 4444,4445 (none: all)")
	f.registerMetrics(flags)
	flags.StringVar(&f.socket, "api-socket", "", "`PATH` of the API socket, instead of NAME.sock in the directory that govmm ps lists")
}

// prepare reads --config, and then checks all flags; an error says where in the file the
// flag stands.
func (f *hostFlags) prepare(cmd *cobra.Command, check func() error) (err error) {
	if f.config != "" {
		if f.file, err = readConfig(cmd, f.config); err != nil {
			return usagef(cmd, "%v", err)
		}
	}
	return f.file.explain(check())
}

// named is the arguments of a command, with the name that the file has for one without.
func (f *hostFlags) named(args []string) []string {
	if len(args) == 0 && f.file != nil && f.file.name != "" {
		return []string{f.file.name}
	}
	return args
}

// check reports the first flag that makes no sense.
func (f *hostFlags) check() error {
	if err := serial.CheckBackend(f.serial); err != nil {
		return fmt.Errorf("--serial: %w", err)
	}
	if f.console != "none" {
		if err := serial.CheckBackend(f.console); err != nil {
			return fmt.Errorf("--console: %w", err)
		}
	}
	if _, err := machine.ParseDirtyTracking(f.tracking); err != nil {
		return fmt.Errorf("--dirty-tracking: %w", err)
	}
	if _, err := sandbox.ParseMode(f.sandbox); err != nil {
		return fmt.Errorf("--sandbox: %w", err)
	}
	if _, err := parseUser(f.user); err != nil {
		return fmt.Errorf("--user: %w", err)
	}
	for _, port := range f.ports {
		if port < 1 || port > 65535 {
			return fmt.Errorf("--migrate-ports %d: must be between 1 and 65535", port)
		}
	}
	if err := f.checkMetrics(); err != nil {
		return err
	}
	if f.console == f.serial && f.console != "null" {
		return fmt.Errorf("--console %s: the serial port leads there already; use --serial null, or another place", f.console)
	}
	return nil
}

// host is what a VM needs of its process.
type host struct {
	name    string
	serial  serial.Backend
	console serial.Backend // nil: none
	log     *slog.Logger
	user    *identity
}

// host claims a name, makes the VM, serves its API, and runs it to its end. later is the
// devices, and what the VM needs of this host while it runs; it is called when the VM was made.
func (f *hostFlags) host(cmd *cobra.Command, args []string, build func(host) (*vmm.VM, error), later func() ([]virtio.Spec, sandbox.Policy)) error {
	ctx, quit := context.WithCancel(cmd.Context())
	defer quit()
	args = f.named(args)
	// A reader of the guest's output that goes away (govmm run | head) must not
	// kill the process during a migration, or while its terminal is raw.
	// So must not a file that has reached the limit of the process (ulimit -f).
	signal.Ignore(syscall.SIGPIPE, syscall.SIGXFSZ)

	id, err := parseUser(f.user)
	if err != nil {
		return err
	}
	var claim *api.Claim
	err = id.do(func() (err error) {
		claim, err = f.claim(nameOf(args))
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	defer claim.Release()
	line := newArrivalLine(cmd.Name(), f, cmd.ErrOrStderr())
	log := newLog(line.over(terminalWriter(cmd.ErrOrStderr())))
	defer flushLog(log)
	p := &process{claim: claim, log: log, line: line, quit: quit, user: id, cmd: cmd, flags: f, stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr}
	if f.json {
		p.lines = cmd.OutOrStdout()
	}
	if p.notify, err = newNotifier(); err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	p.recorder = func(devices []virtio.Spec) ([]byte, error) {
		trust, _ := cmd.Flags().GetBool("allow-source-paths") // run has no such flag
		return recordOf(claim.Name(), cmd.Name(), cmd.Flags(), devices, trust)
	}
	outcome, err := p.run(ctx, f, build, later)
	if s := p.heir.Load(); s != nil {
		if err != nil {
			log.Warn("free what the guest had here", "err", err)
		}
		if p.stays() {
			return p.attend(ctx, s)
		}
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", cmd.Name(), claim.Name(), err)
	}
	if outcome.Kind == vmm.Crashed {
		return fmt.Errorf("%s %s: the guest crashed: %s", cmd.Name(), claim.Name(), outcome.Text)
	}
	p.say("%s: %s", claim.Name(), outcome.Text)
	return nil
}

func (f *hostFlags) claim(name string) (*api.Claim, error) {
	if f.socket != "" {
		return api.ClaimSocket(f.socket, name)
	}
	return api.ClaimName(api.Directory(), name)
}

// open opens the other ends of the guest's lines.
func (h *host) open(f *hostFlags, opt serial.Options) (err error) {
	if h.serial, err = serial.OpenBackend(f.serial, opt); err != nil || f.console == "none" {
		return err
	}
	if h.console, err = serial.OpenBackend(f.console, opt); err != nil {
		return errors.Join(err, h.serial.Close())
	}
	return nil
}

// openLines opens the other ends of the guest's lines, or takes those of the process before.
func (p *process) openLines(h *host, f *hostFlags, opt serial.Options) (err error) {
	if p.taking != nil {
		err = p.openPassed(h)
	} else if err = h.open(f, opt); err == nil {
		for spec, l := range map[string]*serial.Backend{f.serial: &h.serial, f.console: &h.console} {
			if spec == "stdio" {
				k := &keptLine{Backend: *l, line: p.line}
				*l, p.kept = k, append(p.kept, k)
			}
		}
	}
	p.serial, p.console = h.serial, h.console
	return err
}

// process is one that holds a VM.
type process struct {
	claim *api.Claim
	state string // directory for records of migrations; "": there is none
	log   *slog.Logger
	lines io.Writer     // for --json; nil: nobody reads it
	line  *progressLine // of a guest that arrives
	quit  func()        // ends the VM: the key for it was pressed
	user  *identity
	cmd   *cobra.Command
	flags *hostFlags

	serial, console       serial.Backend // nil: there is none
	stdin, stdout, stderr *os.File
	notify                *notifier

	// For the process that takes the guest over.
	recorder func([]virtio.Spec) ([]byte, error)
	recorded error                     // why it cannot be told how the VM was started
	kept     []*keptLine               // on stdio
	heir     atomic.Pointer[successor] // that has taken the guest over; nil: none has
	signals  chan os.Signal            // for it

	// Of a process that has taken a guest over itself, or is to; nil otherwise.
	taking    *taking
	attendant *fdpass.Held // the one that somebody watches in its place; nil: nobody does
}

// say prints a line of what the user has asked for.
func (p *process) say(format string, args ...any) {
	p.log.Info(fmt.Sprintf(format, args...))
}

// run makes the VM, and serves its API while it runs. When run returns the terminal
// is as it was before, and the last answer has been sent.
func (p *process) run(ctx context.Context, f *hostFlags, build func(host) (*vmm.VM, error), later func() ([]virtio.Spec, sandbox.Policy)) (vmm.Outcome, error) {
	defer collectLate().Stop()
	f.startNets(p.user)
	h := host{name: p.claim.Name(), log: p.log, user: p.user}
	var err error
	opt := serial.Options{Quit: p.quit, Watcher: []string{"/proc/self/exe", watchTerminal}}
	if err := p.user.do(func() error { return p.openLines(&h, f, opt) }); err != nil {
		return vmm.Outcome{}, err
	}
	vm, err := build(h)
	if err != nil {
		err = errors.Join(err, h.serial.Close())
		if h.console != nil {
			err = errors.Join(err, h.console.Close())
		}
		return vmm.Outcome{}, err
	}
	// Only now: to build may take a while, and until here a signal may simply end
	// the process. The terminal is not raw yet, and the kernel drops the claim.
	ctx, watching, stop := onSignals(ctx, vm, p.say)
	defer stop()
	devices, policy := later()
	_ = p.user.do(func() error { return p.makeState() })
	err = p.user.become(devices, vm.Addr() != nil, policy)
	var ln net.Listener
	var measured net.Listener
	if err == nil {
		measured, err = f.openMetrics()
		if err != nil && p.taking != nil { // the process that is replaced has the port still
			p.say("without --metrics-listen from here on: %v", err)
			err = nil
		}
	}
	if err == nil {
		ln, err = p.claim.Listen() // as the user that removes it
	}
	if err == nil && p.taking == nil {
		var text []byte
		if text, p.recorded = p.recorder(devices); p.recorded == nil {
			p.recorded = p.claim.Record(text)
		}
	}
	if err == nil {
		err = p.cage(f, policy)
	}
	if err != nil {
		return vmm.Outcome{}, errors.Join(err, vm.Stop(ctx))
	}
	vm.OnMigration(p.keepRecord)
	server := api.NewServer(vm, p.claim.Socket())
	server.Config = func() map[string]any { return p.configuration(vm) }
	defer p.watchdog(vm, server)()
	server.Upgrade = func() (api.Upgrading, error) { return p.upgrade(vm) }
	served := make(chan error, 1)
	over := make(chan struct{})
	go func() { served <- p.serve(vm, server, ln, over) }()
	if measured != nil {
		p.say("metrics at http://%s/metrics", measured.Addr())
		go func() { _ = server.ServeMetrics(measured) }()
	}
	switch addr := vm.Addr(); {
	case p.taking != nil:
		_ = p.taking.before.Send(msgReady, struct{}{}) // its end is noticed otherwise
	case addr != nil:
		p.say("listening on %s", addr)
		p.tell(received{Listening: addr.String(), Name: p.claim.Name(), Socket: p.claim.Socket()})
	default:
		p.say("%s runs; its API socket is %s", p.claim.Name(), p.claim.Socket())
	}
	if p.taking == nil {
		p.notify.say("READY=1")
	}
	var leaving sync.WaitGroup
	if p.line.out != nil {
		shown := p.showArrival(vm)
		leaving.Go(func() {
			select {
			case <-vm.Arrived():
			case <-over:
			}
			shown()
		})
	}
	leaving.Go(func() {
		select {
		case <-vm.Moved(): // govmm migrate waits for the name, and not for memory to be freed
		case <-over:
		}
		if p.heir.Load() == nil {
			p.notify.say("STOPPING=1")
		}
		server.Shutdown()
		p.claim.Release()
	})
	leaving.Go(func() {
		select {
		case <-vm.Arrived(): // its taps are there
			p.tell(received{Arrived: vm.Info().Name, Name: p.claim.Name(), Socket: p.claim.Socket()})
			select {
			case <-vm.Whole(): // what follows stops all threads, and waits for those that wait for memory
			case <-over:
				return
			}
			if err := sandbox.DropCapabilities(); err != nil {
				h.log.Warn("the process keeps capabilities that it needs no more", "err", err)
			}
		case <-over:
		}
	})
	<-watching
	outcome, err := vm.Run(ctx) // closes the backends, which restores the terminal
	close(over)
	leaving.Wait()
	return outcome, errors.Join(err, <-served)
}

// serve serves the API; that of a guest of the process before when it is here.
func (p *process) serve(vm *vmm.VM, server *api.Server, ln net.Listener, over <-chan struct{}) error {
	if p.taking != nil {
		select {
		case <-vm.Arrived():
		case <-over:
			return nil
		}
	}
	return server.Serve(ln)
}

// powerer is a VM with a power button.
type powerer interface {
	PowerOff(ctx context.Context) error
	Ended() <-chan struct{}
}

// onSignals returns a context that ends when the process is told to end. The first
// signal presses the guest's power button, and the second ends the VM at once; so
// does the first if the guest does not listen to its button. From when watching is
// closed it is so. stop ends the watch for signals.
func onSignals(ctx context.Context, vm powerer, say func(string, ...any)) (_ context.Context, watching chan struct{}, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 2)
	watching = make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		defer cancel()
		// Here, since it waits for another thread with each signal, and a start does
		// something else meanwhile.
		signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
		close(watching)
		select {
		case s := <-signals:
			asked := make(chan error, 1)
			go func() { asked <- vm.PowerOff(ctx) }() // a device that hangs may hold it up
			select {
			case err := <-asked:
				if err != nil {
					return
				}
			case <-signals:
				return
			case <-ctx.Done():
				return
			}
			select {
			case <-vm.Ended(): // a receiver without a guest
			default:
				say("%v: the guest was asked to power off; a second signal ends it at once", s)
			}
		case <-ctx.Done():
			return
		}
		select {
		case <-signals:
		case <-ctx.Done():
		}
	})
	return ctx, watching, func() {
		<-watching
		signal.Stop(signals)
		cancel()
		watch.Wait()
	}
}

// terminalWriter ends lines as a terminal in raw mode needs it, if out is one.
func terminalWriter(out io.Writer) io.Writer {
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		return crWriter{out}
	}
	return out
}

type crWriter struct{ out io.Writer }

func (w crWriter) Write(p []byte) (int, error) {
	if _, err := w.out.Write(bytes.ReplaceAll(p, []byte("\n"), []byte("\r\n"))); err != nil {
		return 0, err
	}
	return len(p), nil
}
