package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// record says how a VM was started, for the process that takes its guest over: what that one
// gets of this host is what this one was given by its user, and nothing that a guest could
// have made of the VM's process since. It is written before the guest runs, and the sandbox
// does not let the process change it.
type record struct {
	Name    string `json:"name"`
	Command string `json:"command"` // run or receive
	// Flags are those that were given, with their values.
	Flags []recordedFlag `json:"flags"`
	// Devices name something of this host.
	Devices []recordedDevice `json:"devices"`
	// TrustPaths is --allow-source-paths.
	TrustPaths bool `json:"trust_paths"`
}

type recordedFlag struct {
	Name   string   `json:"name"`
	Values []string `json:"values"`
	// Host says that it is one of hostFlags. The others are for who asks for the VM's
	// configuration: the guest's devices are in Devices, and the rest comes with the guest.
	Host bool `json:"host"`
}

type recordedDevice struct {
	Kind string          `json:"kind"`
	Spec json.RawMessage `json:"spec"`
}

// notRecorded are flags that the process which takes over is told in another way: the user
// is who it is started as, and so is the path of its socket.
var notRecorded = []string{"api-socket", "user", "sandbox", "config"}

// recordOf makes the record of a VM that was started with these flags and devices.
func recordOf(name, command string, flags *pflag.FlagSet, devices []virtio.Spec, trust bool) ([]byte, error) {
	r := record{Name: name, Command: command, TrustPaths: trust}
	known := hostFlagSet(new(hostFlags))
	flags.Visit(func(f *pflag.Flag) {
		if slices.Contains(notRecorded, f.Name) {
			return
		}
		one := recordedFlag{Name: f.Name, Values: []string{f.Value.String()}, Host: known.Lookup(f.Name) != nil}
		switch list := f.Value.(type) {
		case *texts:
			one.Values = *list
		case pflag.SliceValue:
			one.Values = list.GetSlice()
		}
		r.Flags = append(r.Flags, one)
	})
	for _, d := range devices {
		if !machine.UsesHost(d) {
			continue
		}
		spec, err := json.Marshal(d)
		if err != nil {
			return nil, fmt.Errorf("record %s: %w", d, err)
		}
		r.Devices = append(r.Devices, recordedDevice{d.Kind(), spec})
	}
	return json.Marshal(r)
}

// hostFlagSet registers the flags.
func hostFlagSet(f *hostFlags) *pflag.FlagSet {
	set := pflag.NewFlagSet("", pflag.ContinueOnError)
	f.registerSet(set)
	return set
}

// readRecord returns the record, its flags and its devices. Another version may have written
// it: what is not known here is refused by its name.
func readRecord(text []byte) (r record, f hostFlags, devices []virtio.Spec, err error) {
	fail := func(err error) (record, hostFlags, []virtio.Spec, error) {
		return r, f, nil, fmt.Errorf("how the VM was started: %w", err)
	}
	if len(text) == 0 {
		return fail(errors.New("it was not recorded (by an older govmm, or since a device cannot be taken over)"))
	}
	if err := strictJSON(text, &r); err != nil {
		return fail(err)
	}
	set := hostFlagSet(&f)
	for _, one := range r.Flags {
		if !one.Host {
			continue
		}
		if set.Lookup(one.Name) == nil || slices.Contains(notRecorded, one.Name) {
			return fail(fmt.Errorf("--%.60s: this govmm does not know it", one.Name))
		}
		for _, v := range one.Values {
			if err := set.Set(one.Name, v); err != nil {
				return fail(fmt.Errorf("--%.60s: %w", one.Name, err))
			}
		}
	}
	kinds := machine.Kinds()
	for _, d := range r.Devices {
		i := slices.IndexFunc(kinds, func(k virtio.Kind) bool { return k.Name == d.Kind })
		if i < 0 {
			return fail(fmt.Errorf("device of kind %.40q: this govmm does not know it", d.Kind))
		}
		spec := kinds[i].New()
		if err := strictJSON(d.Spec, spec); err != nil {
			return fail(fmt.Errorf("device of kind %s: %w", d.Kind, err))
		}
		// What a receiver was given leaves to the guest what is the guest's.
		if err := spec.Validate(); err != nil && r.Command != "receive" {
			return fail(err)
		}
		devices = append(devices, spec)
	}
	if err := f.check(); err != nil {
		return fail(err)
	}
	return r, f, devices, nil
}

// command is the command with what was recorded of its flags, as far as this version knows
// them.
func (r *record) command() *cobra.Command {
	cmd := newRun()
	if r.Command == "receive" {
		cmd = newReceive()
	}
	for _, one := range r.Flags {
		for _, v := range one.Values {
			_ = cmd.Flags().Set(one.Name, v) // what another version has written may not be known
		}
	}
	return cmd
}

func strictJSON(text []byte, v any) error {
	d := json.NewDecoder(bytes.NewReader(text))
	d.DisallowUnknownFields()
	return d.Decode(v)
}
