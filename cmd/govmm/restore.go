package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/govmm/govmm/vmm"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
	"github.com/govmm/govmm/vmm/sandbox"
	"github.com/govmm/govmm/vmm/snapshot"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// restoreFlags are those flags of govmm run that say how a snapshot is restored.
type restoreFlags struct {
	from       string
	mode       string
	trustPaths bool
	diskDir    string
	identity   bool
}

func (f *restoreFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.from, "from", "", "restore the snapshot in `DIR` (govmm snapshot) instead of starting a kernel; disks, taps and sockets are given as for govmm receive")
	flags.StringVar(&f.mode, "restore", string(snapshot.Auto), "with --from, `HOW` memory comes: lazy (mapped: the guest runs before it is read), eager (read and checked first) or auto: lazy unless it is compressed")
	flags.StringVar(&f.diskDir, "disk-dir", "", "with --from, `DIR` in which the VM gets disks of its own, made of those in the snapshot: NAME-disk0.img and so on")
	flags.BoolVar(&f.identity, "new-identity", false, "with --from, give the guest other MAC addresses and another vsock CID: random ones, or those of --net and --vsock")
	flags.BoolVar(&f.trustPaths, "allow-source-paths", false, "with --from, let the snapshot name the disks, taps, bridges and sockets of this host, and take its huge pages: for one that you made yourself")
}

// ofRestore are the flags that need --from; with it, machineFlags make no sense: the
// machine is the snapshot's.
var (
	ofRestore    = []string{"restore", "allow-source-paths", "disk-dir", "new-identity"}
	machineFlags = []string{"kernel", "image", "size", "boot-entry", "initrd", "no-unpack", "cmdline", "cpus", "cpu", "memory", "prefill", "cloud-init", "network-config", "ssh-key", "hostname"}
)

// unused reports a flag that needs --from.
func (f *restoreFlags) unused(cmd *cobra.Command) error {
	for _, name := range ofRestore {
		if cmd.Flags().Changed(name) {
			return fmt.Errorf("--%s needs --from", name)
		}
	}
	return nil
}

// restoreConfig checks the flags and turns them into a configuration.
func (f *runFlags) restoreConfig(cmd *cobra.Command) (cfg vmm.RestoreConfig, err error) {
	f.restored = true
	backing := memory.Backing("")
	if cmd.Flags().Changed("memory-backing") {
		backing = memory.Backing(f.backing)
		_, err = memory.ParseBacking(f.backing)
	}
	var mode snapshot.Mode
	if err == nil {
		if mode, err = snapshot.ParseMode(f.mode); err != nil {
			err = fmt.Errorf("--restore: %w", err)
		}
	}
	if err == nil && backing != "" && mode != snapshot.Eager {
		err = errors.New("--memory-backing: memory that is restored lazily is the snapshot's file; use --restore eager too")
	}
	if err == nil {
		err = f.hostFlags.check()
	}
	given := slices.Clone(machineFlags)
	for _, k := range machine.Kinds() {
		if k.ParseHere == nil && k.Usage != "" {
			given = append(given, k.Name)
		}
	}
	for _, name := range given {
		if err == nil && cmd.Flags().Changed(name) {
			err = fmt.Errorf("--%s and --from exclude each other: the machine is the snapshot's", name)
		}
	}
	var devices []virtio.Spec
	if err == nil {
		devices, err = f.devices()
	}
	if err != nil {
		return cfg, usagef(cmd, "%v", err)
	}
	devices = slices.DeleteFunc(devices, func(d virtio.Spec) bool { // a flag's default
		return slices.ContainsFunc(machine.Kinds(), func(k virtio.Kind) bool { return k.Name == d.Kind() && k.ParseHere == nil })
	})
	return vmm.RestoreConfig{Mode: mode, Backing: backing, Devices: append(devices, beside.devices...), Kinds: beside.kinds, AllowSourcePaths: f.trustPaths, DiskDir: f.diskDir, NewIdentity: f.identity,
		Tracking: machine.DirtyTracking(f.tracking), Overcommit: f.overcommit}, nil
}

// runRestored runs the guest of a snapshot.
func (f *runFlags) runRestored(cmd *cobra.Command, args []string) error {
	cfg, err := f.restoreConfig(cmd)
	if err != nil {
		return err
	}
	s, err := snapshot.Open(f.from)
	if err != nil {
		return fmt.Errorf("%s: %w", tried(cmd, args), err)
	}
	defer s.Close()
	if args = f.named(args); len(args) == 0 {
		args = []string{s.Name}
	}
	var devices []virtio.Spec
	if len(s.Disks) > 0 && s.Disks[0].Kept != snapshot.DisksNone && cfg.DiskDir == "" && !slices.ContainsFunc(cfg.Devices, isDisk) {
		return fmt.Errorf("%s: the snapshot has the guest's disks, which no guest writes: --disk-dir DIR is where this VM gets its own, or --disk path=FILE for each is one that you made of them", tried(cmd, args))
	}
	return f.host(cmd, args, func(h host) (*vmm.VM, error) {
		cfg.Name, cfg.Serial, cfg.Console, cfg.Log = h.name, h.serial, h.console, h.log
		if cfg.DiskReader, err = readerFor(firstDisk(cfg.Devices) != nil || cfg.AllowSourcePaths || cfg.DiskDir != ""); err != nil {
			return nil, err
		}
		stop := newProgressLine(cmd.ErrOrStderr(), "auto").during(readingMemory("restoring", s.Read, s.Manifest.Memory.Bytes))
		vm, err := vmm.NewRestored(cmd.Context(), s, cfg)
		stop()
		if err != nil {
			return nil, adviseRestore(err)
		}
		devices = vm.DeviceSpecs()
		return vm, nil
	}, func() ([]virtio.Spec, sandbox.Policy) {
		policy := laterOf(devices, false)
		policy.Kill = cfg.DiskReader != nil
		return devices, policy
	})
}

func isDisk(d virtio.Spec) bool { return d.Kind() == blk.Kind.Name }

// adviseRestore adds to an error what to do about it.
func adviseRestore(err error) error {
	if strings.Contains(err.Error(), "does not give to every guest") {
		return fmt.Errorf("%w; or --allow-source-paths, for a snapshot that you made yourself", err)
	}
	return err
}
