package main

import (
	"strings"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/spf13/pflag"
)

// deviceFlags are the flags of virtio devices: what each returns when the command
// line has been read.
type deviceFlags []func() ([]virtio.Spec, error)

// registerRun adds a flag for each kind of device that a machine may have.
func (f *deviceFlags) registerRun(flags *pflag.FlagSet) { f.registerEither(flags, new(bool)) }

// registerEither is registerRun. If *restored is set when the flags are read, they say
// what of this host the devices of a guest get that there was before.
func (f *deviceFlags) registerEither(flags *pflag.FlagSet, restored *bool) {
	for _, k := range machine.Kinds() {
		if k.Parse == nil {
			f.add(flags, k, k.Usage, nil)
			continue
		}
		f.add(flags, k, k.Usage, func(words string) (virtio.Spec, error) {
			if *restored && k.ParseHere != nil {
				return k.ParseHere(words)
			}
			return k.Parse(words)
		})
	}
}

// registerReceive adds a flag for each kind whose devices use something of the
// host.
func (f *deviceFlags) registerReceive(flags *pflag.FlagSet) {
	for _, k := range machine.Kinds() {
		if k.ParseHere != nil {
			f.add(flags, k, k.HereUsage, k.ParseHere)
		}
	}
}

func (f *deviceFlags) add(flags *pflag.FlagSet, k virtio.Kind, usage string, parse func(string) (virtio.Spec, error)) {
	switch {
	case usage == "":
	case parse == nil:
		on := flags.Bool(k.Name, k.Default, usage)
		*f = append(*f, func() ([]virtio.Spec, error) {
			if !*on {
				return nil, nil
			}
			return []virtio.Spec{k.New()}, nil
		})
	case k.Max == 1:
		value := flags.String(k.Name, "", usage)
		*f = append(*f, func() ([]virtio.Spec, error) {
			if *value == "" {
				return nil, nil
			}
			s, err := parse(*value)
			return []virtio.Spec{s}, err
		})
	default:
		values := new(texts)
		flags.Var(values, k.Name, usage)
		*f = append(*f, func() (specs []virtio.Spec, err error) {
			for _, v := range *values {
				s, err := parse(v)
				if err != nil {
					return nil, err
				}
				specs = append(specs, s)
			}
			return specs, nil
		})
	}
}

// devices returns the devices that the command line asks for.
func (f *deviceFlags) devices() (all []virtio.Spec, err error) {
	for _, read := range *f {
		specs, err := read()
		if err != nil {
			return nil, err
		}
		all = append(all, specs...)
	}
	return all, nil
}

// texts is the value of a flag that may be given several times.
type texts []string

// String implements [pflag.Value].
func (t *texts) String() string { return strings.Join(*t, " ") }

// Set implements [pflag.Value].
func (t *texts) Set(s string) error {
	*t = append(*t, s)
	return nil
}

// Append, Replace and GetSlice implement [pflag.SliceValue].
func (t *texts) Append(s string) error { return t.Set(s) }

func (t *texts) Replace(list []string) error {
	*t = list
	return nil
}

func (t *texts) GetSlice() []string { return *t }

// Type implements [pflag.Value]; usage texts name the value themselves.
func (t *texts) Type() string { return "string" }
