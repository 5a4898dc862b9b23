package vmm

import (
	"encoding/json"

	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/vmm/machine"
)

// Devices describes the virtio devices of a VM, in the order of their slots.
//
// In JSON it is an object with a field for each kind. A kind without anything to
// tell is true or false ("rng"), one of which there is at most one is its
// description ("vsock"), and the others are a list, with an s behind the kind's
// name ("disks").
type Devices []machine.DeviceInfo

// Of returns the description of the first device of a kind, nil if there is none.
func (d Devices) Of(kind string) virtio.Info {
	for _, one := range d {
		if one.Kind.Name == kind {
			return one.Info
		}
	}
	return nil
}

// field is the name of a kind's field in JSON.
func field(k virtio.Kind) string {
	if k.Max == 1 {
		return k.Name
	}
	return k.Name + "s"
}

// MarshalJSON implements json.Marshaler.
func (d Devices) MarshalJSON() ([]byte, error) {
	fields := map[string]any{}
	for _, k := range machine.Kinds() {
		switch {
		case k.Max != 1:
			fields[field(k)] = []virtio.Info{}
		case k.NewInfo == nil:
			fields[field(k)] = false
		}
	}
	for _, one := range d {
		name := field(one.Kind)
		switch list, _ := fields[name].([]virtio.Info); {
		case one.Kind.Max != 1:
			fields[name] = append(list, one.Info)
		case one.Info == nil:
			fields[name] = true
		default:
			fields[name] = one.Info
		}
	}
	return json.Marshal(fields)
}

// UnmarshalJSON implements json.Unmarshaler. Devices of kinds that are not among
// machine.Kinds are passed over.
func (d *Devices) UnmarshalJSON(b []byte) error {
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(b, &fields); err != nil {
		return err
	}
	*d = Devices{}
	for _, k := range machine.Kinds() {
		raw, ok := fields[field(k)]
		if !ok {
			continue
		}
		one := []json.RawMessage{raw}
		if k.Max != 1 {
			if err := json.Unmarshal(raw, &one); err != nil {
				return err
			}
		}
		for _, raw := range one {
			info := machine.DeviceInfo{Kind: k, Name: k.Name}
			if k.NewInfo == nil {
				var is bool
				if err := json.Unmarshal(raw, &is); err != nil {
					return err
				}
				if !is {
					continue
				}
			} else {
				info.Info = k.NewInfo()
				if err := json.Unmarshal(raw, info.Info); err != nil {
					return err
				}
			}
			*d = append(*d, info)
		}
	}
	return nil
}
