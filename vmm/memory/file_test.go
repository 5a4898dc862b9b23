package memory

import "testing"

// A file of guest memory has the slots one after another, as the memory itself.
func TestFileLayout(t *testing.T) {
	for _, size := range []uint64{1 << 20, 256 << 20, HoleStart, HoleStart + 4096, 5 << 30, 70 << 30} {
		m, err := New(size, Anonymous)
		if err != nil {
			t.Fatal(err)
		}
		got, off := Layout(size), uint64(0)
		if len(got) != len(m.slots) {
			t.Fatalf("%d bytes: %d slots, expected %d", size, len(got), len(m.slots))
		}
		for i, s := range m.slots {
			if got[i].GPA != s.GPA || got[i].Size != s.Size || s.off != off {
				t.Errorf("%d bytes: slot %d is %+v at %#x, expected %+v at %#x", size, i, got[i], off, s.Slot, s.off)
			}
			off += s.Size
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
