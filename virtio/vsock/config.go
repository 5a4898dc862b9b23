package vsock

import (
	"fmt"
	"math"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/govmm/govmm/virtio"
)

const (
	// MinCID and MaxCID are the limits of a guest's CID: 0 to 2 are the
	// hypervisor, the loopback and the host, 2^32-1 means any (vsock(7)), and
	// the upper half of the field is reserved (section 5.10.4).
	MinCID = 3
	MaxCID = math.MaxUint32 - 1
	// DefaultCID is the guest's CID by default. Guests cannot connect to each
	// other, so all may have the same.
	DefaultCID = MinCID

	// maxName is what of a longer path may be its last element: the socket is then
	// reached by the number of its directory's open file.
	maxName, longest = 64, 4000
	// maxPath leaves room in sun_path, 108 bytes with its zero (unix(7)), for
	// the longest _PORT.
	maxPath = 107 - len("_4294967295")
)

// Config says what the device is: plain data.
type Config struct {
	// CID is the guest's context id, [MinCID] to [MaxCID]; 0 is [DefaultCID].
	CID uint32 `cbor:"cid"`
	// Path is the unix socket at which programs of the host reach the guest.
	// The guest reaches sockets of the host at Path, an underscore and the port
	// number.
	Path string `cbor:"path"`
	// Renewed says that CID is another one than that of the saved state, which is a copy's.
	Renewed bool `cbor:"-"`
}

// ParseConfig parses the value of a --vsock option: PATH, or a list such as
// cid=3,path=PATH. A comma that belongs to the path is written twice.
func ParseConfig(option string) (Config, error) {
	var c Config
	fail := func(format string, a ...any) (Config, error) {
		return Config{}, fmt.Errorf("vsock %q: %s", option, fmt.Sprintf(format, a...))
	}
	seen := map[string]bool{}
	for i, item := range virtio.SplitOption(option) {
		key, value, has := strings.Cut(item, "=")
		if i == 0 && !has {
			key, value = "path", item
		}
		if seen[key] {
			return fail("%s is given twice", key)
		}
		seen[key] = true
		switch key {
		case "path":
			c.Path = value
		case "cid":
			n, err := strconv.ParseUint(value, 10, 32)
			if err != nil || n < MinCID || n > MaxCID {
				return fail("cid=%s: must be between %d and %d", value, MinCID, uint32(MaxCID))
			}
			c.CID = uint32(n)
		default:
			return fail("%q is unknown: use path=, cid= (a comma in a path is written twice)", key)
		}
	}
	if err := c.Validate(); err != nil {
		return fail("%v", err)
	}
	return c, nil
}

// Validate checks the values. It does not look at the host.
func (c Config) Validate() error {
	switch {
	case c.Path == "":
		return fmt.Errorf("path=PATH is missing")
	case strings.IndexByte(c.Path, 0) >= 0:
		return fmt.Errorf("the path has a zero byte")
	case c.Path[0] == '@':
		return fmt.Errorf("path=%q: must be a file, such as %q", c.Path, "./"+c.Path)
	case len(c.Path) > maxPath && (len(c.Path) > longest || len(filepath.Base(c.Path)) > maxName):
		return fmt.Errorf("the path must have at most %d bytes, or its last element at most %d, so that PATH_PORT fits a socket address; got %d", maxPath, maxName, len(c.Path))
	case c.CID != 0 && (c.CID < MinCID || c.CID > MaxCID):
		return fmt.Errorf("cid must be between %d and %d, got %d", MinCID, uint32(MaxCID), c.CID)
	}
	return nil
}

// String returns the option from which [ParseConfig] makes c.
func (c Config) String() string {
	s := "path=" + strings.ReplaceAll(c.Path, ",", ",,")
	if c.CID != 0 {
		s += ",cid=" + strconv.FormatUint(uint64(c.CID), 10)
	}
	return s
}

// GuestCID is the guest's CID.
func (c Config) GuestCID() uint32 {
	if c.CID == 0 {
		return DefaultCID
	}
	return c.CID
}
