// Package cloudinit makes the seed with which cloud-init sets up a guest: the disk of its
// data source NoCloud (https://docs.cloud-init.io/en/latest/reference/datasources/nocloud.html).
//
// A seed is a small ISO 9660 image with the label CIDATA and files of fixed names. It is
// made in memory; virtio/blk shows it to a guest as a read-only disk.
//
//	iso, err := cloudinit.Config{Name: "web", Keys: keys}.Seed()
//
// What is in the files is the owner's. It is checked here, so that a mistake is an error
// of a command, and not of a guest that cannot be logged in to.
package cloudinit

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"go.yaml.in/yaml/v3"
)

// MaxFile is the largest size of a file that a user gives, in bytes.
const MaxFile = 1 << 20

// Label is the volume label by which cloud-init finds a seed.
const Label = "CIDATA"

// The names of the files of a seed.
const (
	userData      = "user-data"
	metaData      = "meta-data"
	vendorData    = "vendor-data"
	networkConfig = "network-config"
)

// Config is what a seed is made of. The zero value of each field but Name is useful.
type Config struct {
	// Name is the VM's. The guest takes two seeds of the same name for the same instance,
	// and does what it does once for an instance only at the first.
	Name string
	// Hostname is the guest's; "": Name.
	Hostname string
	// UserData is cloud-init's configuration, a script, or what else it takes; nil: none.
	UserData []byte
	// Network is the network's configuration; nil: cloud-init's own, which is DHCP.
	Network []byte
	// Keys are SSH keys that may log in as the image's default user, as [ParseKeys] returns them.
	Keys []string
}

// meta is the file meta-data.
type meta struct {
	InstanceID string   `yaml:"instance-id"`
	Hostname   string   `yaml:"local-hostname,omitempty"`
	Keys       []string `yaml:"public-keys,omitempty"`
}

// Seed checks the configuration and returns the seed: a disk of a few blocks. The same
// configuration makes the same bytes.
func (c Config) Seed() ([]byte, error) {
	if c.Hostname == "" {
		c.Hostname = c.Name
	} else if err := CheckHostname(c.Hostname); err != nil {
		return nil, err
	}
	if c.UserData == nil {
		c.UserData = []byte("#cloud-config\n{}\n")
	} else if err := CheckUserData(c.UserData); err != nil {
		return nil, err
	}
	m, err := yaml.Marshal(meta{instanceID(c.Name), c.Hostname, c.Keys})
	if err != nil {
		return nil, fmt.Errorf("meta-data: %w", err)
	}
	files := []file{{metaData, m}, {userData, c.UserData}, {vendorData, nil}}
	if c.Network != nil {
		if err := CheckNetwork(c.Network); err != nil {
			return nil, err
		}
		files = append(files, file{networkConfig, c.Network})
	}
	return writeISO(Label, files)
}

// ErrNoSeed is wrapped by the error for what is not a seed of this package.
var ErrNoSeed = errors.New("not a seed of govmm")

// Renew returns a seed that is another one only in its instance-id, which is new: for a copy
// of a guest, which does once more what cloud-init does once for an instance (host keys of
// SSH, for one).
func Renew(seed []byte) ([]byte, error) {
	files, err := readISO(seed)
	if err != nil {
		return nil, err
	}
	for i, f := range files {
		if f.name != metaData {
			continue
		}
		var m meta
		if err := yaml.Unmarshal(f.data, &m); err != nil {
			return nil, fmt.Errorf("%w: meta-data: %w", ErrNoSeed, err)
		}
		if len(m.InstanceID) < idBytes*2 {
			return nil, fmt.Errorf("%w: an instance-id of %d characters", ErrNoSeed, len(m.InstanceID))
		}
		var id [idBytes]byte
		_, _ = rand.Read(id[:]) // it never fails
		m.InstanceID = m.InstanceID[:len(m.InstanceID)-idBytes*2] + hex.EncodeToString(id[:])
		if files[i].data, err = yaml.Marshal(m); err != nil {
			return nil, fmt.Errorf("meta-data: %w", err)
		}
		return writeISO(Label, files)
	}
	return nil, fmt.Errorf("%w: it has no meta-data", ErrNoSeed)
}

// idBytes is the length of what tells an instance from another one of the same name.
const idBytes = 8

// instanceID is the same for a name. That of a copy is as long, so that its seed is as large.
func instanceID(name string) string {
	sum := sha256.Sum256([]byte(name))
	return "govmm-" + name + "-" + hex.EncodeToString(sum[:idBytes])
}

// CheckHostname reports why a name is none of a host (RFC 1123).
func CheckHostname(name string) error {
	if len(name) > 253 {
		return fmt.Errorf("host name of %d bytes: must be at most 253", len(name))
	}
	for _, label := range strings.Split(name, ".") {
		ok := label != "" && len(label) <= 63 && label[0] != '-' && label[len(label)-1] != '-'
		for _, b := range []byte(label) {
			ok = ok && (b >= 'a' && b <= 'z' || b >= 'A' && b <= 'Z' || b >= '0' && b <= '9' || b == '-')
		}
		if !ok {
			return fmt.Errorf("host name %.80q: must be letters, digits and - (not first or last), with dots between labels of at most 63", name)
		}
	}
	return nil
}

// userDataKinds are how user-data begins that cloud-init knows, apart from what is compressed.
var userDataKinds = []string{"#cloud-config", "#!", "#include", "#cloud-boothook", "#part-handler", "## template:", "Content-Type:", "MIME-Version:", "From "}

// CheckUserData reports why cloud-init would not take a file as user-data. YAML is parsed.
func CheckUserData(b []byte) error {
	if err := checkSize(userData, b); err != nil {
		return err
	}
	if bytes.HasPrefix(b, []byte("\x1f\x8b")) { // gzip, which cloud-init unpacks
		return nil
	}
	first, _, _ := bytes.Cut(b, []byte("\n"))
	known := ""
	for _, kind := range userDataKinds {
		if len(first) >= len(kind) && strings.EqualFold(string(first[:len(kind)]), kind) {
			known = kind
			break
		}
	}
	if known == "" {
		return fmt.Errorf("user-data: expected #cloud-config or #! in the first line, found %.40q: cloud-init would ignore it", first)
	}
	if word, _, _ := strings.Cut(strings.TrimSpace(string(first)), " "); word != "#cloud-config" {
		return nil
	}
	return checkYAML(userData, b, false)
}

// CheckNetwork reports why a file is no network configuration of version 1 or 2.
func CheckNetwork(b []byte) error {
	if err := checkSize(networkConfig, b); err != nil {
		return err
	}
	return checkYAML(networkConfig, b, true)
}

func checkSize(what string, b []byte) error {
	if len(b) == 0 || len(b) > MaxFile {
		return fmt.Errorf("%s: %d bytes: must be between 1 and %d", what, len(b), MaxFile)
	}
	return nil
}

// checkYAML parses a file that must be a mapping, if there is anything in it.
func checkYAML(what string, b []byte, network bool) error {
	var all map[string]any
	if err := yaml.Unmarshal(b, &all); err != nil {
		text, _, _ := strings.Cut(strings.TrimPrefix(err.Error(), "yaml: "), "\n")
		var wrong *yaml.TypeError
		if errors.As(err, &wrong) && len(wrong.Errors) > 0 {
			text = wrong.Errors[0]
		}
		return fmt.Errorf("%s: %.200s", what, text)
	}
	if !network {
		return nil
	}
	if inner, ok := all["network"].(map[string]any); ok && len(all) == 1 {
		all = inner
	}
	if v := all["version"]; v != 1 && v != 2 {
		return fmt.Errorf("%s: expected version: 1 or version: 2, found %.40q", what, fmt.Sprint(v))
	}
	return nil
}
