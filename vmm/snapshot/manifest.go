package snapshot

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/govmm/govmm/mempage"
	"github.com/govmm/govmm/vmm/machine"
	"github.com/govmm/govmm/vmm/memory"
)

// formatVersion is that of a manifest. What is added later is a feature.
const formatVersion = 1

// features of the format, in use as a manifest says.
const featurePacked = "memory-zstd"

var knownFeatures = []string{featurePacked}

// Bounds of a manifest.
const (
	maxManifest = 1 << 20 // bytes
	maxDisks    = 64
	maxText     = 4096 // bytes, of a path
)

// Manifest describes a snapshot.
type Manifest struct {
	Format   int       `json:"format"`
	Features []string  `json:"features"` // of the format, those that it uses
	Govmm    string    `json:"govmm"`    // the version that made it
	Created  time.Time `json:"created"`
	Name     string    `json:"name"` // of the VM
	CPUs     int       `json:"cpus"`
	Memory   RAM       `json:"memory"`
	Disks    []Disk    `json:"disks"`
	// Session is the nonce that the samples of the disks are made with, in hexadecimal.
	Session string          `json:"session"`
	Parts   map[string]Part `json:"parts"` // by the name of the file
}

// RAM is the guest's memory in a snapshot.
type RAM struct {
	Bytes       uint64      `json:"bytes"`      // of the guest
	DataBytes   uint64      `json:"data_bytes"` // pages that are not zero
	Compression Compression `json:"compression"`
	SHA256      string      `json:"sha256"` // see sumMemory
}

// Part is another file.
type Part struct {
	Bytes  int64  `json:"bytes"`
	SHA256 string `json:"sha256"`
}

// Disk is one of the guest's disks.
type Disk struct {
	Path     string `json:"path"` // when the snapshot was made
	Bytes    uint64 `json:"bytes"`
	ReadOnly bool   `json:"readonly"`
	// Kept is how the image is kept in the snapshot: none, reflink or copy.
	Kept Disks `json:"kept"`
}

func damaged(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrDamaged, fmt.Errorf(format, args...))
}

// parseManifest reads a manifest that anybody may have written.
func parseManifest(b []byte) (m Manifest, err error) {
	if len(b) > maxManifest {
		return m, damaged("%s: must have at most %d bytes", manifestFile, maxManifest)
	}
	// First what tells whether the rest can be understood.
	var head struct {
		Format   int      `json:"format"`
		Features []string `json:"features"`
	}
	if err := json.Unmarshal(b, &head); err != nil {
		return m, damaged("%s: %w", manifestFile, err)
	}
	switch {
	case head.Format > formatVersion:
		return m, fmt.Errorf("%w: format %d, this govmm knows %d", ErrNewer, head.Format, formatVersion)
	case head.Format != formatVersion:
		return m, damaged("%s: expected format %d, found %d", manifestFile, formatVersion, head.Format)
	}
	for _, f := range head.Features {
		if !slices.Contains(knownFeatures, f) {
			return m, fmt.Errorf("%w: it uses %.60q, which this govmm does not know", ErrNewer, f)
		}
	}
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	if err := d.Decode(&m); err != nil {
		return m, damaged("%s: %w", manifestFile, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return m, damaged("%s: expected its end after the JSON object", manifestFile)
	}
	if err := m.check(); err != nil {
		return m, damaged("%s: %w", manifestFile, err)
	}
	return m, nil
}

// check reports what no snapshot has.
func (m *Manifest) check() error {
	size := m.Memory.Bytes
	switch {
	case machine.ValidName(m.Name) != nil:
		return machine.ValidName(m.Name)
	case m.CPUs < 1 || m.CPUs > machine.MaxCPUs:
		return fmt.Errorf("%d vCPUs: must be between 1 and %d", m.CPUs, machine.MaxCPUs)
	case size < memory.MinSize || size > memory.MaxSize || size%mempage.Size != 0:
		return fmt.Errorf("memory of %d bytes: must be a multiple of %d between %d and %d", size, mempage.Size, memory.MinSize, uint64(memory.MaxSize))
	case m.Memory.DataBytes > size:
		return fmt.Errorf("%d bytes of data in %d bytes of memory", m.Memory.DataBytes, size)
	case m.packed() != slices.Contains(m.Features, featurePacked):
		return fmt.Errorf("memory is kept as %.20q, and the features are %.60q", m.Memory.Compression, m.Features)
	case !isSum(m.Memory.SHA256):
		return errors.New("memory: expected a SHA-256")
	case len(m.Session) != 32 || !isHex(m.Session):
		return errors.New("session: expected 16 bytes in hexadecimal")
	case len(m.Disks) > maxDisks:
		return fmt.Errorf("%d disks: must be at most %d", len(m.Disks), maxDisks)
	}
	if _, err := ParseCompression(string(m.Memory.Compression)); err != nil {
		return fmt.Errorf("memory: compression %w", err)
	}
	for i, d := range m.Disks {
		if _, err := ParseDisks(string(d.Kept)); err != nil {
			return fmt.Errorf("disk %d: %w", i, err)
		}
		if len(d.Path) > maxText || d.Bytes > 1<<62 {
			return fmt.Errorf("disk %d: a path of %d bytes, or an image of %d", i, len(d.Path), d.Bytes)
		}
	}
	return m.checkParts()
}

func (m *Manifest) checkParts() error {
	need := []string{specFile, stateFile, hotFile}
	may := append(need, storageFile, kernelFile, initrdFile)
	if m.packed() {
		need = append(need, indexFile)
		may = append(may, indexFile)
	}
	for _, name := range need {
		if _, ok := m.Parts[name]; !ok {
			return fmt.Errorf("%s is missing in the list of parts", name)
		}
	}
	for name, p := range m.Parts {
		most := mostOf[name]
		if name == indexFile {
			most = indexSize(m.Memory.Bytes)
		}
		switch {
		case !slices.Contains(may, name):
			return fmt.Errorf("part %.60q: this govmm does not know it", name)
		case p.Bytes < 0 || p.Bytes > most:
			return fmt.Errorf("%s of %d bytes: must be at most %d", name, p.Bytes, most)
		case !isSum(p.SHA256):
			return fmt.Errorf("%s: expected a SHA-256", name)
		}
	}
	return nil
}

// packed says whether memory is compressed.
func (m *Manifest) packed() bool { return m.Memory.Compression == CompressZstd }

func isSum(s string) bool { return len(s) == 64 && isHex(s) }

func isHex(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil && strings.ToLower(s) == s
}

// encode returns the manifest as it is written.
func (m *Manifest) encode() ([]byte, error) {
	b, err := json.MarshalIndent(m, "", "  ")
	return append(b, '\n'), err
}
