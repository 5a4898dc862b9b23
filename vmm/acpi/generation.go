package acpi

// The VM generation ID ("Virtual Machine Generation ID", Microsoft, 2012): 16 bytes in
// reserved memory whose address the DSDT gives, and which change when a copy of a machine
// begins to run. An event tells the guest. They are behind a marker, so that it is known
// whether a guest's tables have the device: they are those of the version of govmm that
// started it.
const (
	generationPage = 0xef000 // in the BIOS area, behind the tables
	// GenerationID is the guest physical address of the 16 bytes.
	GenerationID = generationPage + 16
	// GenerationSize is how many bytes there are from the marker on.
	GenerationSize = 32
	// GenerationMarker is the guest physical address of the marker.
	GenerationMarker = generationPage
)

// generationMarker is what is in the 16 bytes before the ID.
var generationMarker = [16]byte{'G', 'O', 'V', 'M', 'M', ' ', 'V', 'M', ' ', 'G', 'E', 'N', ' ', 'I', 'D', '1'}

// Generation is a VM generation ID.
type Generation [16]byte

// Table is the marker and the ID, as they are in memory.
func (g Generation) Table() Table {
	return Table{"VGEN", GenerationMarker, append(append([]byte{}, generationMarker[:]...), g[:]...)}
}

// ParseGeneration returns the ID in what is at [GenerationMarker]; ok is false if there is
// none.
func ParseGeneration(b []byte) (g Generation, ok bool) {
	if len(b) < GenerationSize || [16]byte(b) != generationMarker {
		return g, false
	}
	return Generation(b[16:GenerationSize]), true
}
