package blk

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/govmm/govmm/virtio"
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
	// Path is a file whose bytes are the disk's, or a block device.
	Path string `cbor:"path"`
	// ReadOnly offers the guest a disk that it cannot write.
	ReadOnly bool `cbor:"readonly"`
	// Direct bypasses the host's page cache (O_DIRECT).
	Direct bool `cbor:"direct"`
	// ID is what the guest reads as the disk's serial number, at most 20
	// printable ASCII characters. Empty is none.
	ID string `cbor:"id"`
	// Queues is the number of virtqueues, one for each vCPU at best; at most
	// [MaxQueues]. 0 is 1.
	Queues int `cbor:"queues"`
	// Raw says that the image is raw whatever its content looks like. Without
	// it an image that begins as qcow2 and the like do is refused. Set it at
	// the destination of a migration: the disk was judged when the guest was
	// started, and its bytes have been the guest's since.
	Raw bool `cbor:"raw"`
}

// ParseConfig parses the value of a --disk option: PATH, or a list such as
// path=PATH,readonly,direct,id=ID,queues=N,format=raw. A comma that belongs to
// a value is written twice.
func ParseConfig(option string) (Config, error) {
	var c Config
	fail := func(format string, a ...any) (Config, error) {
		return Config{}, fmt.Errorf("disk %q: %s", option, fmt.Sprintf(format, a...))
	}
	seen := map[string]bool{}
	for i, item := range virtio.SplitOption(option) {
		key, value, has := strings.Cut(item, "=")
		if i == 0 && !has && key != "readonly" && key != "direct" {
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
		case "queues":
			c.Queues, err = strconv.Atoi(value)
			if err != nil || c.Queues < 1 || c.Queues > MaxQueues {
				return fail("queues=%s: a number from 1 to %d is needed", value, MaxQueues)
			}
		case "format":
			if c.Raw = value == "raw"; !c.Raw {
				return fail("format=%s: only raw images are known; qemu-img convert -O raw makes one", value)
			}
		default:
			return fail("%q is not known: use path=, readonly, direct, id=, queues=, format=raw (a comma in a path is written twice)", key)
		}
		if err != nil {
			return fail("%s: %v", key, err)
		}
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

// Validate says what is wrong with the values; the file is not looked at.
func (c Config) Validate() error {
	if c.Path == "" {
		return fmt.Errorf("path=PATH is missing")
	}
	if strings.IndexByte(c.Path, 0) >= 0 {
		return fmt.Errorf("the path has a zero byte")
	}
	if len(c.ID) > idBytes {
		return fmt.Errorf("id %q has %d characters, %d are possible", c.ID, len(c.ID), idBytes)
	}
	for _, b := range []byte(c.ID) {
		if b < ' ' || b > '~' {
			return fmt.Errorf("id %q: only printable ASCII is possible", c.ID)
		}
	}
	if c.Queues < 0 || c.Queues > MaxQueues {
		return fmt.Errorf("%d queues: 1 to %d are possible", c.Queues, MaxQueues)
	}
	return nil
}

// String returns the option that [ParseConfig] makes c of.
func (c Config) String() string {
	double := func(s string) string { return strings.ReplaceAll(s, ",", ",,") }
	s := "path=" + double(c.Path)
	if c.ReadOnly {
		s += ",readonly"
	}
	if c.Direct {
		s += ",direct"
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
	return s
}

func (c Config) queues() int { return max(c.Queues, 1) }
