package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/govmm/govmm/cloudinit"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/blk"
	"github.com/spf13/cobra"
)

// seedFlags are the flags of govmm run that make a seed for cloud-init.
type seedFlags struct {
	userData, network, key, hostname string

	config *cloudinit.Config // nil: there is no seed
}

func (f *seedFlags) register(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&f.userData, "cloud-init", "", "`FILE` with user-data for cloud-init in the guest: #cloud-config, a script")
	flags.StringVar(&f.network, "network-config", "", "`FILE` with cloud-init's network configuration, version 1 or 2")
	flags.StringVar(&f.key, "ssh-key", "", "`FILE` with public SSH keys that may log in as the default user of the guest's image, by cloud-init")
	flags.StringVar(&f.hostname, "hostname", "", "`NAME` of the guest, set by cloud-init (with --cloud-init, --network-config or --ssh-key it is the VM's if none is given)")
}

// read reads and checks the files.
func (f *seedFlags) read() (err error) {
	if f.userData == "" && f.network == "" && f.key == "" && f.hostname == "" {
		return nil
	}
	c := &cloudinit.Config{Hostname: f.hostname}
	for _, one := range []struct {
		flag, path string
		take       func([]byte) error
	}{
		{"cloud-init", f.userData, func(b []byte) error { c.UserData = b; return cloudinit.CheckUserData(b) }},
		{"network-config", f.network, func(b []byte) error { c.Network = b; return cloudinit.CheckNetwork(b) }},
		{"ssh-key", f.key, func(b []byte) (err error) { c.Keys, err = cloudinit.ParseKeys(b); return err }},
	} {
		if one.path == "" {
			continue
		}
		b, err := readImage("file", one.path, cloudinit.MaxFile)
		if err == nil {
			err = one.take(b)
		}
		var path *os.PathError
		if err != nil && errors.As(err, &path) { // which has the name
			return fmt.Errorf("--%s: %w", one.flag, err)
		} else if err != nil {
			return fmt.Errorf("--%s %s: %w", one.flag, one.path, err)
		}
	}
	if f.hostname != "" {
		if err := cloudinit.CheckHostname(f.hostname); err != nil {
			return fmt.Errorf("--hostname: %w", err)
		}
	}
	f.config = c
	return nil
}

// device is the seed of a VM; nil: none.
func (f *seedFlags) device(name string) (virtio.Spec, error) {
	if f.config == nil {
		return nil, nil
	}
	f.config.Name = name
	iso, err := f.config.Seed()
	if err != nil {
		return nil, err
	}
	return &blk.SeedSpec{Content: iso}, nil
}
