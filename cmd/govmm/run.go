package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/govmm/govmm/internal/testhook"
	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/cpu"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/spf13/cobra"
)

// runFlags are the flags of govmm run.
type runFlags struct {
	hostFlags
	deviceFlags
	bootFlags
	seedFlags
	imageFlags
	kernel   string
	initrd   string
	noUnpack bool
	cmdline  string
	cpus     int
	cpu      string
	memory   sizeFlag
	backing  string
	prefill  bool
	restored bool
	restoreFlags
	force bool

	slowFlush time.Duration
}

func newRun() *cobra.Command {
	f := runFlags{memory: 256 << 20}
	var cfg vmm.Config
	cmd := &cobra.Command{
		Use:   "run [NAME]",
		Short: "Run a guest until it powers off, is stopped, or has moved away",
		Long: `Run a guest until it powers off, is stopped, or has moved to another process.

Without --kernel it boots the system on the first --disk, with the kernel that is
installed there. Without one it is the demo guest that govmm contains; type help
to it. On a terminal Ctrl-A x ends the VM, and Ctrl-A h lists the other keys.`,
		Args: oneName,
		PreRunE: func(cmd *cobra.Command, args []string) error {
			return f.prepare(cmd, func() (err error) {
				if f.from != "" {
					_, err = f.restoreConfig(cmd)
				} else {
					cfg, err = f.machine(cmd, args)
				}
				return err
			})
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if f.from != "" {
				return f.runRestored(cmd, args)
			}
			if err := f.imageFlags.make(cmd); err != nil {
				return fmt.Errorf("%s: %w", tried(cmd, args), err)
			}
			return f.host(cmd, args, func(h host) (*vmm.VM, error) {
				if cfg.Kernel, err = readImage("kernel", f.kernel, machine.MaxKernel); err != nil {
					return nil, err
				}
				if cfg.Initrd, err = readImage("initrd", f.initrd, machine.MaxInitrd); err != nil {
					return nil, err
				}
				if err := f.choose(&cfg); err != nil {
					return nil, err
				}
				cfg.Name, cfg.Serial, cfg.Console, cfg.Log = h.name, h.serial, h.console, h.log
				if seed, err := f.seedFlags.device(h.name); err != nil {
					return nil, err
				} else if seed != nil {
					cfg.Devices = append(cfg.Devices, seed)
				}
				return vmm.NewVM(cfg)
			}, func() ([]virtio.Spec, sandbox.Policy) {
				policy := laterOf(cfg.Devices, false)
				policy.Kill = cfg.DiskBoot
				return cfg.Devices, policy
			})
		},
	}
	f.hostFlags.register(cmd)
	flags := cmd.Flags()
	f.registerEither(flags, &f.restored)
	f.restoreFlags.register(flags)
	f.seedFlags.register(cmd)
	f.imageFlags.register(flags)
	flags.StringVar(&f.kernel, "kernel", "", "`FILE` with a kernel: a Linux bzImage, or an ELF file with a PVH entry (vmlinux)")
	f.bootFlags.register(flags)
	flags.StringVar(&f.initrd, "initrd", "", "`FILE` with the kernel's initial RAM disk")
	flags.BoolVar(&f.noUnpack, "no-unpack", false, "let a bzImage unpack itself in the guest")
	flags.StringVar(&f.cmdline, "cmdline", "", "the kernel's command line (`WORDS`), instead of that on the disk, or of console=ttyS0 and, with a disk and no --initrd, root=/dev/vda; the demo guest lists its own when help is typed")
	flags.IntVar(&f.cpus, "cpus", 1, "`N` vCPUs")
	flags.StringVar(&f.cpu, "cpu", cpu.Host, "the guest's processor: this host's, or a baseline that other hosts have too, `MODEL` "+strings.Join(cpu.Models()[1:], " or "))
	flags.Var(&f.memory, "memory", "guest memory, as in 512M or 2G")
	flags.StringVar(&f.backing, "memory-backing", string(memory.DefaultBacking), "`KIND` of host memory: anonymous, memfd or hugetlb")
	flags.BoolVar(&f.force, "force", false, "start from a disk whose guest has moved away with a copy of it")
	flags.BoolVar(&f.prefill, "prefill", false, "fill the guest's memory with a pattern before the kernel is loaded")
	_ = flags.MarkHidden("prefill") // for tests, see testhook.Prefill
	flags.DurationVar(&f.slowFlush, "slow-flush", 0, "how long each flush of a disk takes besides")
	_ = flags.MarkHidden("slow-flush") // for tests, see testhook.SlowFlush
	return cmd
}

// beside are kinds, and devices of these, that tests add to every machine.
var beside struct {
	kinds   []virtio.Kind
	devices []virtio.Spec
}

// machine checks the flags and turns them into a VM's configuration.
func (f *runFlags) machine(cmd *cobra.Command, args []string) (vmm.Config, error) {
	backing, err := memory.ParseBacking(f.backing)
	switch {
	case err != nil:
		err = fmt.Errorf("--memory-backing: %w", err)
	case f.cpus < 1 || f.cpus > machine.MaxCPUs:
		err = fmt.Errorf("--cpus %d: must be between 1 and %d", f.cpus, machine.MaxCPUs)
	case !slices.Contains(cpu.Models(), f.cpu):
		err = fmt.Errorf("--cpu %q: expected one of %s", f.cpu, strings.Join(cpu.Models(), ", "))
	case f.kernel == "" && (f.initrd != "" || f.noUnpack):
		err = fmt.Errorf("--initrd and --no-unpack need --kernel")
	case f.memory < memory.MinSize || f.memory > memory.MaxSize || f.memory%mempage.Size != 0:
		err = fmt.Errorf("--memory %v: must be a multiple of 4K between %v and %v", &f.memory, formatSize(memory.MinSize), formatSize(memory.MaxSize))
	default:
		err = errors.Join(f.hostFlags.check(), f.restoreFlags.unused(cmd))
	}
	var devices []virtio.Spec
	if err == nil {
		devices, err = f.devices()
	}
	if err == nil {
		var disk *blk.Spec
		if disk, err = f.imageFlags.device(nameOf(f.named(args))); disk != nil {
			devices = append([]virtio.Spec{disk}, devices...)
		}
	}
	if err == nil {
		err = f.bootFlags.check(f.kernel, devices)
	}
	if err == nil {
		err = f.seedFlags.read()
	}
	if err != nil {
		return vmm.Config{}, usagef(cmd, "%v", err)
	}
	testhook.Prefill.Store(f.prefill)
	testhook.SlowFlush.Store(int64(f.slowFlush))
	return vmm.Config{CPUs: f.cpus, CPU: f.cpu, Memory: uint64(f.memory), Backing: backing, Cmdline: f.cmdline,
		NoUnpack: f.noUnpack, Force: f.force, Devices: append(devices, beside.devices...), Kinds: beside.kinds, Tracking: machine.DirtyTracking(f.tracking), Overcommit: f.overcommit}, nil
}

// readImage reads a file of at most so many bytes; it reads none if path is "".
func readImage(what, path string, most int64) ([]byte, error) {
	if path == "" {
		return nil, nil
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read the %s: %w", what, err)
	}
	defer f.Close()
	// As large as it is: a buffer that grows leaves as much garbage, which stays.
	var size int64
	if info, err := f.Stat(); err == nil {
		size = min(info.Size(), most)
	}
	buf := bytes.NewBuffer(make([]byte, 0, size+bytes.MinRead))
	_, err = buf.ReadFrom(io.LimitReader(f, most+1))
	b := buf.Bytes()
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the %s: %w", what, err)
	case int64(len(b)) > most:
		return nil, fmt.Errorf("%s %s: must be at most %v", what, path, formatSize(uint64(most)))
	case len(b) == 0:
		return nil, fmt.Errorf("%s %s: is empty", what, path)
	}
	return b, nil
}
