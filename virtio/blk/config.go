package blk

import (
	"fmt"
	"strconv"
	"strings"

	disks "github.com/govmm/govmm/image"
	"github.com/govmm/govmm/virtio"
	"github.com/govmm/govmm/virtio/limit"
)

const (
	// MaxQueues is the largest number of queues of a disk.
	MaxQueues = 32
	// idBytes is the length of the identity that a guest reads
	// (VIRTIO_BLK_T_GET_ID, section 5.2.6).
	idBytes = 20
)

// Config says what a disk is. It is plain data; its zero values but that of
// Path are useful.
type Config struct {
	// Path is a file with the bytes of the disk, or a block device.
	Path string `cbor:"path"`
	// ReadOnly offers the guest a disk that it cannot write.
	ReadOnly bool `cbor:"readonly"`
	// Direct bypasses the host's page cache (O_DIRECT).
	Direct bool `cbor:"direct"`
	// ID is what the guest reads as the disk's serial number, at most 20
	// printable ASCII characters. It may be empty.
	ID string `cbor:"id"`
	// Queues is the number of virtqueues, at most [MaxQueues]; more than one for
	// each vCPU does not help. 0 means 1.
	Queues int `cbor:"queues"`
	// Raw says that the image is raw. Without it, an image that looks like one
	// of qcow2 or of another format is refused. Set it at the destination of a
	// migration: the image was checked when the guest was started, and the
	// guest may have written anything since.
	Raw bool `cbor:"raw"`
	// Format is what the image is, if it is not raw: disks.QCOW2, which must be Ephemeral.
	Format disks.Format `cbor:"format,omitzero"`
	// Ephemeral keeps what the guest writes in a file without a name, which is gone when
	// the disk is closed. The image is only read.
	Ephemeral bool `cbor:"ephemeral,omitzero"`
	// Copy says that the disk is copied here from another host, to a file at Path that is
	// not there yet, or whose guest has moved away with a copy. It does not travel.
	Copy bool `cbor:"-"`
	// For is the ID of the guest's disk that this is for, on the host to which a guest comes.
	For string `cbor:"-"`
	// Force uses an image whose guest has moved away with a copy. It does not travel.
	Force bool `cbor:"-"`
	// Copied says that another file than at the source is expected: a copy of it.
	Copied bool `cbor:"-"`
	// Limit is what this host lets the guest do a second; it does not travel.
	Limit limit.Rates `cbor:"-"`
}

// ParseConfig parses the value of a --disk option: PATH, or a list such as
// path=PATH,readonly,direct,id=ID,queues=N,format=raw,ephemeral,bps=N,iops=N. A comma that
// belongs to a value is written twice. An ephemeral disk whose name ends in .qcow2 is one,
// unless format says otherwise.
func ParseConfig(option string) (Config, error) {
	var c Config
	fail := func(format string, a ...any) (Config, error) {
		return Config{}, fmt.Errorf("disk %q: %s", option, fmt.Sprintf(format, a...))
	}
	seen := map[string]bool{}
	for i, item := range virtio.SplitOption(option) {
		key, value, has := strings.Cut(item, "=")
		if i == 0 && !has && key != "readonly" && key != "direct" && key != "ephemeral" {
			key, value, has = "path", item, true
		}
		if seen[key] {
			return fail("%s is given twice", key)
		}
		seen[key] = true
		var err error
		switch key {
		case "path":
			c.Path = value
		case "id":
			c.ID = value
		case "readonly":
			c.ReadOnly, err = parseSwitch(value, has)
		case "direct":
			c.Direct, err = parseSwitch(value, has)
		case "for":
			c.For = value
		case "copy":
			c.Copy, err = parseSwitch(value, has)
		case "queues":
			c.Queues, err = strconv.Atoi(value)
			if err != nil || c.Queues < 1 || c.Queues > MaxQueues {
				return fail("queues=%s: must be between 1 and %d", value, MaxQueues)
			}
		case "format":
			switch disks.Format(value) {
			case disks.Raw:
				c.Raw = true
			case disks.QCOW2:
				c.Format = disks.QCOW2
			default:
				return fail("format=%s: only raw and qcow2 are known; qemu-img convert -O raw makes a raw image", value)
			}
		case "ephemeral":
			c.Ephemeral, err = parseSwitch(value, has)
		default:
			known, err := c.Limit.Set(key, value)
			if !known {
				return fail("%q is unknown: use path=, readonly, direct, id=, queues=, format=, ephemeral, bps=, iops= (a comma in a path is written twice)", key)
			} else if err != nil {
				return fail("%v", err)
			}
		}
		if err != nil {
			return fail("%s: %v", key, err)
		}
	}
	if c.Ephemeral && !c.Raw && disks.FormatOfName(c.Path) == disks.QCOW2 {
		c.Format = disks.QCOW2
	}
	if err := c.Validate(); err != nil {
		return fail("%v", err)
	}
	return c, nil
}

func parseSwitch(value string, has bool) (bool, error) {
	switch {
	case !has, value == "on", value == "true", value == "yes":
		return true, nil
	case value == "off", value == "false", value == "no":
		return false, nil
	}
	return false, fmt.Errorf("%q is neither on nor off", value)
}

// Validate checks the values. It does not open the file.
func (c Config) Validate() error {
	if c.Path == "" {
		return fmt.Errorf("path=PATH is missing")
	}
	if strings.IndexByte(c.Path, 0) >= 0 {
		return fmt.Errorf("the path has a zero byte")
	}
	if len(c.ID) > idBytes {
		return fmt.Errorf("id %q must have at most %d characters, got %d", c.ID, idBytes, len(c.ID))
	}
	for _, b := range []byte(c.ID) {
		if b < ' ' || b > '~' {
			return fmt.Errorf("id %q must be printable ASCII", c.ID)
		}
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return fmt.Errorf("queues must be between 1 and %d, got %d", MaxQueues, c.Queues)
	}
	if err := c.validateFormat(); err != nil {
		return err
	}
	return c.Limit.Validate()
}

func (c Config) validateFormat() error {
	switch {
	case c.Format != "" && c.Format != disks.QCOW2:
		return fmt.Errorf("format %.40q: expected qcow2, or none for raw", c.Format)
	case c.Format == disks.QCOW2 && !c.Ephemeral:
		return fmt.Errorf("format=qcow2: such an image is read and never written; add ephemeral (what the guest writes is gone at its end), or make a raw disk of it: govmm image import")
	case c.Format == disks.QCOW2 && c.Raw:
		return fmt.Errorf("format is both raw and qcow2")
	case c.Ephemeral && c.ReadOnly:
		return fmt.Errorf("ephemeral and readonly exclude each other")
	case c.Ephemeral && c.Direct:
		return fmt.Errorf("ephemeral and direct exclude each other")
	}
	return nil
}

// String returns the option from which [ParseConfig] makes c.
func (c Config) String() string {
	double := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	s := "path=" + double(c.Path)
	if c.ReadOnly {
		s += ",readonly"
	}
	if c.Direct {
		s += ",direct"
	}
	if c.Copy {
		s += ",copy"
	}
	if c.ID != "" {
		s += ",id=" + double(c.ID)
	}
	if c.Queues != 0 {
		s += ",queues=" + strconv.Itoa(c.Queues)
	}
	if c.Raw {
		s += ",format=raw"
	}
	if c.Format != "" {
		s += ",format=" + string(c.Format)
	}
	if c.Ephemeral {
		s += ",ephemeral"
	}
	return s + c.Limit.String()
}

func (c Config) queues() int { return max(c.Queues, 1) }
