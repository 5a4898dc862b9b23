package image

import "bytes"

// ProbeBytes is how many bytes of each end of a file say what its format may be.
const ProbeBytes = 512

// Magic is how files of a format begin, or end.
type Magic struct {
	Format string
	// AtEnd says that Offset counts from the first of the last [ProbeBytes] of a file.
	AtEnd  bool
	Offset int
	Bytes  string
}

// Magics are those of formats that are often taken for raw.
var Magics = []Magic{
	{"qcow2", false, 0, "QFI\xfb"},
	{"qed", false, 0, "QED\x00"},
	{"vmdk", false, 0, "KDMV"},
	{"vmdk", false, 0, "COWD"},
	{"vmdk", false, 0, "# Disk DescriptorFile"},
	{"vdi", false, 0x40, "\x7f\x10\xda\xbe"},
	{"vhdx", false, 0, "vhdxfile"},
	{"vhd", false, 0, "conectix"},
	{"vhd", true, 0, "conectix"},
	{"parallels", false, 0, "WithoutFreeSpace"},
	{"parallels", false, 0, "WithouFreSpacExt"},
	{"dmg", true, 0, "koly"},
	{"gzip", false, 0, "\x1f\x8b\x08"},
	{"xz", false, 0, "\xfd7zXZ\x00"},
	{"zstd", false, 0, "\x28\xb5\x2f\xfd"},
	{"bzip2", false, 0, "BZh"},
}

// Sniff names the format of a file that begins with head and ends with tail, "" if it is
// none of [Magics]. What it finds is a guess: a raw disk begins and ends with what its
// guest wrote there.
func Sniff(head, tail []byte) string {
	for _, m := range Magics {
		b := head
		if m.AtEnd {
			b = tail
		}
		if m.Offset <= len(b) && bytes.HasPrefix(b[m.Offset:], []byte(m.Bytes)) {
			return m.Format
		}
	}
	return ""
}
