package machine

import (
	"fmt"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/govmm/govmm/internal/strictcbor"
	"github.com/govmm/govmm/virtio"
)

// specFeatures are the features of a [Spec] and of a [machineState] that came after
// v0.1.0, as far as they do not belong to a device.
var specFeatures = []string{featureDiskBoot, featureGPE}

// specWire is a spec as it travels.
type specWire struct {
	Spec
	Devices []deviceSpec `cbor:"devices"`
}

// deviceSpec is a device's spec as it travels.
type deviceSpec struct {
	Kind string          `cbor:"kind"`
	Spec cbor.RawMessage `cbor:"spec"`
}

// encode returns the spec as it travels. made are its devices, which may use
// features of their kinds; nil: there are none yet.
func (s *Spec) encode(made []virtio.Device) ([]byte, error) {
	w := specWire{Spec: *s, Devices: []deviceSpec{}}
	for i, d := range s.Devices {
		b, err := strictcbor.Marshal(d)
		if err != nil {
			return nil, fmt.Errorf("encode the description of %s: %w", d, err)
		}
		w.Devices = append(w.Devices, deviceSpec{d.Kind(), b})
		w.Features = append(w.Features, inUse(d.Kind(), d)...)
		if made != nil {
			w.Features = append(w.Features, inUse(d.Kind(), made[i])...)
		}
	}
	if s.Boot != nil {
		w.Features = append(w.Features, featureDiskBoot)
	}
	slices.Sort(w.Features)
	w.Features = slices.Compact(w.Features)
	b, err := strictcbor.Marshal(w)
	if err != nil {
		return nil, fmt.Errorf("encode the machine's description: %w", err)
	}
	return b, nil
}

// inUse names the features of a kind that a spec or a device uses.
func inUse(kind string, of any) (names []string) {
	if f, ok := of.(virtio.Featured); ok {
		for _, name := range f.FeaturesInUse() {
			names = append(names, kind+"/"+name)
		}
	}
	return names
}

// knownFeatures are all that a machine with this table of kinds can be asked for.
func knownFeatures(kinds []virtio.Kind) []string {
	known := slices.Clone(specFeatures)
	for _, k := range kinds {
		for _, name := range k.Features {
			known = append(known, k.Name+"/"+name)
		}
	}
	return known
}

// decodeSpec decodes and validates what an untrusted peer may have sent. extra are
// kinds of devices beside the built-in ones.
func decodeSpec(b []byte, extra []virtio.Kind) (Spec, error) {
	return decodeSpecWith(b, extra, func(*Spec) error { return nil })
}

// decodeSpecWith is decodeSpec for a spec to which change adds something before it is
// validated.
func decodeSpecWith(b []byte, extra []virtio.Kind, change func(*Spec) error) (Spec, error) {
	fail := func(err error) (Spec, error) {
		return Spec{}, fmt.Errorf("decode the machine's description: %w", err)
	}
	// First what tells whether the rest can be understood.
	var head struct {
		Version  uint32   `cbor:"version"`
		Features []string `cbor:"features"`
	}
	if err := strictcbor.UnmarshalKnown(b, &head); err != nil {
		return fail(err)
	}
	if head.Version != SpecVersion {
		return Spec{}, (&Spec{Version: head.Version}).Validate()
	}
	kinds := append(Kinds(), extra...)
	known := knownFeatures(kinds)
	var unknown []string
	for _, f := range head.Features {
		if !slices.Contains(known, f) {
			unknown = append(unknown, fmt.Sprintf("%.60q", f))
		}
	}
	if n := len(unknown); n > 0 {
		const most = 8 // of what a peer wrote, in one line
		if n > most {
			unknown = append(unknown[:most], fmt.Sprintf("and %d more", n-most))
		}
		return Spec{}, fmt.Errorf("the guest uses features that this version of govmm does not know: %s", strings.Join(unknown, ", "))
	}

	var w specWire
	if err := strictcbor.Unmarshal(b, &w); err != nil {
		return fail(err)
	}
	s := w.Spec
	s.Kinds = extra
	if len(w.Devices) > maxDevices {
		return fail(fmt.Errorf("%d devices: the bus has room for %d", len(w.Devices), maxDevices))
	}
	for _, d := range w.Devices {
		k, ok := kindOf(kinds, d.Kind)
		if !ok {
			return Spec{}, fmt.Errorf("device of kind %.40q: this govmm does not know it", d.Kind)
		}
		spec := k.New()
		if err := strictcbor.Unmarshal(d.Spec, spec); err != nil {
			return fail(fmt.Errorf("device of kind %s: %w", k.Name, err))
		}
		s.Devices = append(s.Devices, spec)
	}
	if err := change(&s); err != nil {
		return Spec{}, err
	}
	return s, s.Validate()
}
