package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/api"
	"github.com/govmm/govmm/vmm/serial"
)

// hostFlags are those of the commands whose process is the VM's: run and
// receive.
type hostFlags struct {
	serial   string
	console  string
	socket   string
	tracking string
}

func (f *hostFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.serial, "serial", "stdio", "`WHERE` the guest's serial port leads: stdio, file:PATH, unix:PATH or null")
	cmd.Flags().StringVar(&f.console, "console", "none", "`WHERE` the guest's virtio console (hvc0) leads, as --serial; none: there is none")
	cmd.Flags().StringVar(&f.tracking, "dirty-tracking", string(vmm.TrackAuto),
		"`HOW` KVM tracks the guest's writes when it is migrated from here: auto, bitmap or ring")
	cmd.Flags().StringVar(&f.socket, "api-socket", "", "`PATH` of the API socket, instead of NAME.sock where govmm ps looks")
}

// check reports the first flag that makes no sense.
func (f *hostFlags) check() error {
	if !validLine(f.serial) {
		return fmt.Errorf("--serial %q: stdio, file:PATH, unix:PATH or null is wanted", f.serial)
	}
	if _, err := vmm.ParseDirtyTracking(f.tracking); err != nil {
		return fmt.Errorf("--dirty-tracking: %w", err)
	}
	switch {
	case f.console != "none" && !validLine(f.console):
		return fmt.Errorf("--console %q: stdio, file:PATH, unix:PATH, null or none is wanted", f.console)
	case f.console == f.serial && f.console != "null":
		return fmt.Errorf("--console %s: the serial port leads there; give --serial null, say", f.console)
	}
	return nil
}

// validLine says whether a line of characters can lead there.
func validLine(where string) bool {
	kind, path, _ := strings.Cut(where, ":")
	return where == "stdio" || where == "null" || kind == "file" && path != "" || kind == "unix" && path != ""
}

// host is what a VM needs of the process that it lives in.
type host struct {
	name    string
	serial  serial.Backend
	console serial.Backend // nil: none
	logf    func(format string, args ...any)
}

// host claims a name, makes the machine, answers for it on its socket, and
// runs it to its end.
func (f *hostFlags) host(cmd *cobra.Command, args []string, build func(host) (*vmm.VM, error)) error {
	ctx, quit := context.WithCancel(cmd.Context())
	defer quit()
	// A reader of the guest's output that goes away (govmm run | head) must
	// not kill the process in the middle of a migration, its terminal raw.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)

	claim, err := f.claim(nameOf(args))
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	defer claim.Release()
	words := terminalWriter(cmd.ErrOrStderr())
	logf := func(format string, args ...any) { _, _ = fmt.Fprintf(words, "govmm: "+format+"\n", args...) }
	outcome, err := f.serve(ctx, claim, logf, quit, build)
	if err != nil {
		return fmt.Errorf("%s %s: %w", cmd.Name(), claim.Name(), err)
	}
	if outcome.Kind == vmm.Crashed {
		return fmt.Errorf("%s %s: the guest crashed: %s", cmd.Name(), claim.Name(), outcome.Text)
	}
	logf("%s: %s", claim.Name(), outcome.Text)
	return nil
}

func (f *hostFlags) claim(name string) (*api.Claim, error) {
	if f.socket != "" {
		return api.ClaimSocket(f.socket, name)
	}
	return api.ClaimName(api.Directory(), name)
}

// serve makes the machine, and answers for it while it runs. When it returns
// the terminal is as it was, and the last answer has got out.
func (f *hostFlags) serve(ctx context.Context, claim *api.Claim, logf func(string, ...any), quit func(), build func(host) (*vmm.VM, error)) (vmm.Outcome, error) {
	backend, err := serial.OpenBackend(f.serial, serial.Options{Quit: quit})
	if err != nil {
		return vmm.Outcome{}, err
	}
	var console serial.Backend
	if f.console != "none" {
		if console, err = serial.OpenBackend(f.console, serial.Options{Quit: quit}); err != nil {
			return vmm.Outcome{}, errors.Join(err, backend.Close())
		}
	}
	vm, err := build(host{claim.Name(), backend, console, logf})
	if err != nil {
		err = errors.Join(err, backend.Close())
		if console != nil {
			err = errors.Join(err, console.Close())
		}
		return vmm.Outcome{}, err
	}
	// Only now: building may take a while, and a signal may just end it, since
	// the terminal is not raw yet and the kernel drops the claim.
	ctx, stop := onSignals(ctx, vm, logf)
	defer stop()
	ln, err := claim.Listen()
	if err != nil {
		return vmm.Outcome{}, errors.Join(err, vm.Stop())
	}
	server := api.NewServer(&controller{vm, claim.Socket()})
	served := make(chan error, 1)
	go func() { served <- server.Serve(ln) }()
	if addr := vm.Addr(); addr != nil {
		logf("listening on %s", addr)
	} else {
		logf("%s runs; its API socket is %s", claim.Name(), claim.Socket())
	}
	// What building took, a kernel's content more than once, is not needed again.
	go debug.FreeOSMemory()
	outcome, err := vm.Run(ctx) // closes the backend: a terminal is as it was
	server.Shutdown()
	return outcome, errors.Join(err, <-served)
}

// onSignals returns a context that ends when the process is told to. The first
// signal presses the guest's power button, and only the second ends the VM at
// once; so does the first if the guest does not listen. stop ends all that.
func onSignals(ctx context.Context, vm interface{ PowerOff() error }, logf func(string, ...any)) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	var watch sync.WaitGroup
	watch.Go(func() {
		defer cancel()
		select {
		case s := <-signals:
			if vm.PowerOff() != nil {
				return
			}
			logf("%v: the guest was asked to power off; a second signal ends it at once", s)
		case <-ctx.Done():
			return
		}
		select {
		case <-signals:
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		signal.Stop(signals)
		cancel()
		watch.Wait()
	}
}

// terminalWriter ends lines as a terminal in raw mode wants it, if out is one.
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
