package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/memory"
)

// runFlags are the flags of govmm run.
type runFlags struct {
	hostFlags
	kernel  string
	cmdline string
	cpus    int
	memory  sizeFlag
	backing string
}

func newRun() *cobra.Command {
	f := runFlags{memory: 256 << 20}
	cmd := &cobra.Command{
		Use:   "run [NAME]",
		Short: "Run a guest until it powers off, is stopped, or has moved away",
		Long: `Run a guest until it powers off, is stopped, or has moved to another process.

Without --kernel it is the demo guest that govmm carries with it; type help to it.
On a terminal Ctrl-A x ends the VM, and Ctrl-A h lists the other keys.`,
		Args: oneName,
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := f.config(cmd)
			if err != nil {
				return err
			}
			return f.host(cmd, args, func(h host) (*vmm.VM, error) {
				if f.kernel != "" {
					if cfg.Kernel, err = os.ReadFile(f.kernel); err != nil {
						return nil, fmt.Errorf("read the kernel: %w", err)
					}
				}
				cfg.Name, cfg.Serial, cfg.Logf = h.name, h.serial, h.logf
				return vmm.NewVM(cfg)
			})
		},
	}
	f.register(cmd)
	flags := cmd.Flags()
	flags.StringVar(&f.kernel, "kernel", "", "`FILE` with a PVH ELF kernel (an uncompressed vmlinux is one)")
	flags.StringVar(&f.cmdline, "cmdline", "", "the kernel's command line; the demo guest takes `WORDS`, see help there")
	flags.IntVar(&f.cpus, "cpus", 1, "`N` vCPUs")
	flags.Var(&f.memory, "memory", "guest memory, as in 512M or 2G")
	flags.StringVar(&f.backing, "memory-backing", string(memory.DefaultBacking), "`KIND` of host memory: anonymous, memfd or hugetlb")
	return cmd
}

// config checks the flags and turns them into a machine's configuration.
func (f *runFlags) config(cmd *cobra.Command) (vmm.Config, error) {
	backing, err := memory.ParseBacking(f.backing)
	switch {
	case err != nil:
		err = fmt.Errorf("--memory-backing: %w", err)
	case f.cpus < 1:
		err = fmt.Errorf("--cpus %d: at least 1 is needed", f.cpus)
	case f.memory < memory.MinSize || f.memory > memory.MaxSize || f.memory%memory.PageSize != 0:
		err = fmt.Errorf("--memory %v: a multiple of 4K from %v to %v is wanted", &f.memory, formatSize(memory.MinSize), formatSize(memory.MaxSize))
	default:
		err = f.check()
	}
	if err != nil {
		return vmm.Config{}, usagef(cmd, "%v", err)
	}
	return vmm.Config{CPUs: f.cpus, Memory: uint64(f.memory), Backing: backing, Cmdline: f.cmdline}, nil
}
