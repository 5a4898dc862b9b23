package report

import (
	"encoding/json"
	"math"
	"reflect"
	"strconv"
	"time"
)

// The types of results have time.Duration fields, which are milliseconds in JSON:
// fractions of them, or whole ones where the field has the tag ms:"whole". A type
// of the same fields, in which the durations have methods of their own, does that.

type fractionMS time.Duration

// milliseconds is a duration with three decimals.
func milliseconds(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func (d fractionMS) MarshalJSON() ([]byte, error) {
	return json.Marshal(milliseconds(time.Duration(d)))
}

func (d *fractionMS) UnmarshalJSON(b []byte) error {
	var ms float64
	if err := json.Unmarshal(b, &ms); err != nil {
		return err
	}
	*d = fractionMS(math.Round(ms * float64(time.Millisecond)))
	return nil
}

type wholeMS time.Duration

func (d wholeMS) MarshalJSON() ([]byte, error) {
	return strconv.AppendInt(nil, time.Duration(d).Milliseconds(), 10), nil
}

func (d *wholeMS) UnmarshalJSON(b []byte) error { return (*fractionMS)(d).UnmarshalJSON(b) }

// jsonForm returns a struct of the same fields and values as v, a struct, whose
// durations are milliseconds.
func jsonForm(v reflect.Value) reflect.Value {
	var fields []reflect.StructField
	for i := range v.NumField() {
		f := v.Type().Field(i)
		if f.Type == reflect.TypeFor[time.Duration]() {
			f.Type = reflect.TypeFor[fractionMS]()
			if f.Tag.Get("ms") == "whole" {
				f.Type = reflect.TypeFor[wholeMS]()
			}
		}
		fields = append(fields, f)
	}
	form := reflect.New(reflect.StructOf(fields)).Elem()
	copyFields(form, v)
	return form
}

func copyFields(to, from reflect.Value) {
	for i := range to.NumField() {
		to.Field(i).Set(from.Field(i).Convert(to.Field(i).Type()))
	}
}

func marshalMS[T any](v T) ([]byte, error) {
	return json.Marshal(jsonForm(reflect.ValueOf(v)).Interface())
}

func unmarshalMS[T any](b []byte, v *T) error {
	form := jsonForm(reflect.ValueOf(v).Elem())
	if err := json.Unmarshal(b, form.Addr().Interface()); err != nil {
		return err
	}
	copyFields(reflect.ValueOf(v).Elem(), form)
	return nil
}

func (d Downtime) MarshalJSON() ([]byte, error)     { return marshalMS(d) }
func (d *Downtime) UnmarshalJSON(b []byte) error    { return unmarshalMS(b, d) }
func (r RoundStats) MarshalJSON() ([]byte, error)   { return marshalMS(r) }
func (r *RoundStats) UnmarshalJSON(b []byte) error  { return unmarshalMS(b, r) }
func (r Result) MarshalJSON() ([]byte, error)       { return marshalMS(r) }
func (r *Result) UnmarshalJSON(b []byte) error      { return unmarshalMS(b, r) }
func (p Progress) MarshalJSON() ([]byte, error)     { return marshalMS(p) }
func (p *Progress) UnmarshalJSON(b []byte) error    { return unmarshalMS(b, p) }
func (s DirtySample) MarshalJSON() ([]byte, error)  { return marshalMS(s) }
func (s *DirtySample) UnmarshalJSON(b []byte) error { return unmarshalMS(b, s) }
func (r DirtyRate) MarshalJSON() ([]byte, error)    { return marshalMS(r) }
func (r *DirtyRate) UnmarshalJSON(b []byte) error   { return unmarshalMS(b, r) }
func (e Estimate) MarshalJSON() ([]byte, error)     { return marshalMS(e) }
func (e *Estimate) UnmarshalJSON(b []byte) error    { return unmarshalMS(b, e) }
