package report

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"reflect"
	"testing"
	"time"
)

// Scripts read these names and units: testdata/results.json was written when the
// fields were numbers of milliseconds. It is read back whole, too.
func TestResultsInJSON(t *testing.T) {
	const ms, us = time.Millisecond, time.Microsecond
	rate := DirtyRate{Interval: time.Second, Pages: 512, RAMBytes: 3, BytesPerSecond: 4, Samples: []DirtySample{{7800 * us, 4}, {time.Second, 512}}}
	values := []any{
		&Result{Status: "completed", Error: "e", Total: 1234*ms + 999*us, Setup: 20 * ms, Downtime: 36751 * us,
			DowntimeParts: Downtime{1250 * us, 2 * ms, 3001 * us, 4 * ms, 4500 * us, 5 * ms, 6 * ms, 7 * ms, 8500*us + 999},
			DowntimeNote:  "n", GuestResets: 1, StopsUndone: 1, TrialStops: 1, ThrottlePercent: 2, BytesSent: 3, RAMBytes: 4, PagesSent: 5, PagesZero: 6, PagesHole: 7,
			PagesHinted: 8, HintsReceived: 9, HintsLate: 10, HintsRewritten: 11, HintWait: 12 * ms, HintsOff: "o", Channels: 2,
			ChannelBytes: []uint64{1, 2}, Compression: "zstd", CompressionRatio: 1.5, Rounds: []RoundStats{{1, 900 * ms, 2, 3, 4, 5, 6, 7}}},
		&Result{},
		&Progress{PhasePrecopy, "h:1", 1, 2, 3, 4, []uint64{5}, 1.5, 6, 0, 0, 0, 7, 8, 9125 * us, 10, 11 * ms, "e", nil, ""},
		&Progress{},
		&Estimate{true, "n", 3, 1234500 * us, 21500 * us, 5, 250 * us, 7, 8, rate},
		&Estimate{},
	}
	golden, err := os.ReadFile("testdata/results.json")
	if err != nil {
		t.Fatal(err)
	}
	var got bytes.Buffer
	enc := json.NewEncoder(&got)
	enc.SetIndent("", "\t")
	for _, v := range values {
		if err := enc.Encode(v); err != nil {
			t.Fatal(err)
		}
	}
	if got.String() != string(golden) {
		t.Errorf("results are\n%s\nwant\n%s", got.String(), golden)
	}

	// What JSON leaves out of a duration.
	values[0].(*Result).Total -= 999 * us
	values[0].(*Result).DowntimeParts.Wire -= 999
	dec := json.NewDecoder(bytes.NewReader(golden))
	for _, want := range values {
		back := reflect.New(reflect.TypeOf(want).Elem()).Interface()
		if err := dec.Decode(back); err != nil || !reflect.DeepEqual(back, want) {
			t.Errorf("read back: %+v, want %+v (%v)", back, want, err)
		}
	}
	if _, err := dec.Token(); err != io.EOF {
		t.Errorf("more is in the file: %v", err)
	}
	kept := Progress{Elapsed: time.Second, Round: 3}
	if err := json.Unmarshal([]byte(`{"round":4,"a field of later":1}`), &kept); err != nil || kept.Elapsed != time.Second || kept.Round != 4 {
		t.Errorf("fields that are not there: %+v, %v", kept, err)
	}
	if err := json.Unmarshal([]byte(`{"elapsed_ms":"1s"}`), &kept); err == nil {
		t.Error("a string was taken for milliseconds")
	}
}
